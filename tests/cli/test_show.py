"""`qkv show`: what is drawn, and where a model comes from."""

import pytest

from qkv.cli import main
from qkv.cli.show import find_config
from qkv.errors import ConfigError, FileError
from qkv.nn.blocks import BlockConfig
from qkv.nn.norms import RMSNormConfig
from qkv.nn.sublayer import SublayerConfig
from qkv.presets import preset
from qkv.yaml_files import dump_yaml

SMALL = """\
 gpt2 · 124,439,808 parameters · made for 1,024 tokens

     │  token ids  (T)
╭────┴─ embed ─────────────────────────────────────── 39,383,808 parameters ─╮
│ a vector for each of 50,257 tokens, 768 wide                               │
│ + a vector for each of 1,024 positions                                     │
╰────┬───────────────────────────────────────────────────────────────────────╯
     │  x  (T, 768)
╭────┴─ 12 × PreNorm ──────────────────────────────── 85,054,464 parameters ─╮
│    │  x = x + f(norm(x))    norm: LayerNorm                                │
│    │                                                                       │
│    ├─▸ norm ─▸ attention ─╮             12 heads of 64                     │
│    ⊕◂─────────────────────╯             causal mask                        │
│    │                                                                       │
│    ├─▸ norm ─▸ ffn ─╮                   768 → 3,072 → 768, gelu_tanh       │
│    ⊕◂───────────────╯                                                      │
╰────┬───────────────────────────────────────────────────────────────────────╯
     │
╭────┴─ final norm: LayerNorm ──────────────────────────── 1,536 parameters ─╮
╰────┬───────────────────────────────────────────────────────────────────────╯
     │
╭────┴─ head: LMHead ────────────────────────────────────────────────────────╮
│ 768 → 50,257 logits, with the embedder's table                             │
╰────┬───────────────────────────────────────────────────────────────────────╯
     │  logits  (T, vocabulary)
"""

ODD = """\
d_model: 48
embed: {type: VectorEmbedder, n_features: 6, position: {type: SinusoidalPositions}}
blocks:
- {type: Repeat, n: 4, shared: true, pattern: {type: PostNorm, norm: {type: LayerNorm}, sublayers: [{type: FFN}]}}
- type: Repeat
  n: 3
  pattern:
  - type: Sandwich
    norm: {type: RMSNorm}
    sublayers:
    - type: Attention
      n_heads: 4
      n_kv_heads: 2
      mask: {type: And, a: {type: Causal}, b: {type: Or, a: {type: Window, size: 1024}, b: {type: Chunked, size: 9}}}
      position: {type: RoPE, theta: 500000, scaling: {type: Llama3Scaling, factor: 8, original_length: 8192}}
      qk_norm: {type: RMSNorm}
  - type: Parallel
    norm: {type: RMSNorm}
    sublayers: [{type: Attention, n_heads: 4, mask: {type: Not, a: {type: Causal}}}, {type: GLU}, {type: FFN}]
- {type: OutputNorm, norm: {type: RMSNorm}, sublayers: [{type: FFN, d_ff: 5}]}
head: {type: VectorHead, n_out: 3}
"""

ODD_DRAWN = """\
     │  vectors  (T, features)
│ 6 features → 48                                                            │
│ + sines and cosines of the position                                        │
╭────┴─ 4 × PostNorm, one set of weights ──────────────── 18,528 parameters ─╮
│    │  x = norm(x + f(x))    norm: LayerNorm                                │
│    ├─▸ ffn ─╮                           48 → 192 → 48, gelu                │
│    ⊕◂───────╯                                                              │
│    norm                                                                    │
     │  3 × the next 2 in turn
│    ├─▸ norm ─▸ attention ─▸ norm ─╮     4 heads of 12, 2 kv heads          │
│    ⊕◂─────────────────────────────╯     causal & (window 1,024 | chunked 9…│
│    │                                    rotary θ=500,000 (Llama3)          │
│    │                                    queries and keys normed            │
│    ├─▸ norm ─┬─▸ attention ─╮           4 heads of 12                      │
│    │         │              │           ~causal mask                       │
│    │         ├─▸ ffn ───────┤           48 → 2 × 128 → 48                  │
│    │         │              │           gated by silu                      │
│    │         ╰─▸ ffn_2 ─────┤           48 → 192 → 48, gelu                │
│    ⊕◂───────────────────────╯                                              │
│    ├─▸ ffn ─▸ norm ─╮                   48 → 5 → 48, gelu                  │
│ 48 → 3 numbers                                                             │
     │  vectors  (T, out)
"""


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def shown(capsys, *arguments):
    assert main(["show", *map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    return out


def test_a_preset_is_drawn(capsys):
    assert shown(capsys, "gpt2").startswith(SMALL)


def test_parallel_sublayers_with_a_norm_each(capsys):
    lines = [line[:38].rstrip() for line in shown(capsys, "pythia-160m").splitlines()]
    first = next(i for i, line in enumerate(lines) if "├─┬" in line)
    assert lines[first - 1 : first + 5] == [
        "│    │",
        "│    ├─┬─▸ norm ─▸ attention ─╮",
        "│    │ │                      │",
        "│    │ │                      │",
        "│    │ ╰─▸ norm ─▸ ffn ───────┤",
        "│    ⊕◂───────────────────────╯",
    ]


def test_the_table(capsys):
    out = shown(capsys, "llama3-8b", "--dtype", "bfloat16", "--context", "131072")
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "embed 525,336,576 6.5 % 1002 MiB" in rows
    assert "32 × PreNorm 6,979,584,000 86.9 % 13 GiB 48.3 G 128 KiB" in rows
    assert "attention 1,342,177,280 16.7 % 2.5 GiB 37 G 128 KiB" in rows
    assert "total 8,030,261,248 15 GiB 49.4 G 128 KiB" in rows
    assert "The cache of one text of 131,072 tokens: 16 GiB in bfloat16." in rows


def test_every_kind_of_block(tmp_path, capsys):
    (tmp_path / "odd.yaml").write_text(ODD)
    lines = shown(capsys, tmp_path / "odd.yaml").splitlines()
    missing = [line for line in ODD_DRAWN.splitlines() if not any(drawn.startswith(line) for drawn in lines)]
    assert missing == []


def test_an_open_vocabulary_is_said(capsys):
    out = shown(capsys, "small")
    assert out.count("set by the tokenizer ─╮") == 2
    assert "… is not counted: it is set by the tokenizer." in out


def concrete(base):
    for cls in base.__subclasses__():
        yield from concrete(cls)
        if cls.__module__.startswith("qkv.") and not cls.is_abstract():
            yield cls


def test_every_block_of_the_library_has_a_formula():
    formulas = [cls.formula for cls in concrete(BlockConfig)]
    assert all(formulas)
    assert len(set(formulas)) == len(formulas)


def test_every_sublayer_of_the_library_is_described():
    attention = {"n_heads": 2, "mask": preset("gpt2").blocks.pattern.sublayers[0].mask}
    latent = {"norm": RMSNormConfig(), "kv_rank": 4, "plain_dim": 4, "rotary_dim": 2, "value_dim": 4}
    needed = {
        "AttentionConfig": attention,
        "CrossAttentionConfig": attention,
        "LatentAttentionConfig": attention | latent,
    }
    for cls in concrete(SublayerConfig):
        part = cls(**needed.get(cls.__name__, {}))
        assert part.notes(8) != [part.describe()]


def test_the_kernels(capsys, tmp_path):
    window = "{type: And, a: {type: Causal}, b: {type: Window, size: 64}}"
    attention = f"{{type: Attention, n_heads: 4, mask: {window}}}"
    block = f"{{type: PreNorm, norm: {{type: RMSNorm}}, sublayers: [{attention}]}}"
    blocks = f"{{type: Repeat, n: 2, pattern: {block}}}"
    (tmp_path / "windows.yaml").write_text(f"d_model: 48\nembed: {{type: TokenEmbedder}}\nblocks: {blocks}\n")
    out = shown(capsys, "gpt2", "--kernels", "--tokens", "2048", "--batch", "2")
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert "12 causal 2 x 2,048 sdpa 0 B -" in rows
    assert "12 causal packed documents 0 B -" in rows
    out = shown(capsys, tmp_path / "windows.yaml", "--kernels", "--tokens", "2048")
    assert any("causal & window 64" in line and "tiled" in line for line in out.splitlines())
    assert main(["show", "gpt2", "--kernels", "--tokens", "0"]) == 2
    assert "--tokens=0 and --batch=1 must be at least 1" in capsys.readouterr().err


# --- where the config comes from ------------------------------------------------------------------------------------


def test_a_config_file_a_recipe_and_a_run(tmp_path):
    config = preset("gpt2")
    (tmp_path / "config.yaml").write_text(dump_yaml(config.to_dict()))
    (tmp_path / "recipe.yaml").write_text(dump_yaml({"model": config.to_dict(), "steps": 3}))
    assert find_config(str(tmp_path / "config.yaml")) == config
    assert find_config(str(tmp_path / "recipe.yaml")) == config
    assert find_config(str(tmp_path)) == config  # a run, even without a checkpoint


@pytest.mark.parametrize("text", ["model: small", "model: {preset: small}", "preset: small"])
def test_a_file_may_name_a_preset(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert find_config(str(path)) == preset("small")
    path.write_text("model: {preset: small, d_model: 128}")
    assert find_config(str(path)).d_model == 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", r"x\.yaml: holds no model; give a model's config, or a recipe with a key 'model'"),
        ("d_modle: 3", r"x\.yaml: d_modle: Transformer has no 'd_modle'; did you mean 'd_model'\?"),
        ("model: {preset: smal}", r"x\.yaml: no preset 'smal'; did you mean 'small'\?"),
        ("a: [", r"x\.yaml, line 1: not valid YAML"),
    ],
)
def test_a_file_without_a_model(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_config(str(tmp_path / "x.yaml"))


def test_what_is_neither_a_preset_nor_a_path(tmp_path):
    with pytest.raises(ConfigError, match="gpt3: no such file or folder, and no preset 'gpt3'; did you mean 'gpt2'"):
        find_config("gpt3")
    with pytest.raises(FileError, match=r"nothing\.yaml: cannot be read"):
        find_config("nothing.yaml")
    with pytest.raises(FileError, match="has neither"):
        find_config(str(tmp_path))


def test_a_recipe_is_shown_for_its_context(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("model: small\ndata: {source: {type: Files, path: a.txt}}\nsteps: 5\ncontext: 48\n")
    assert main(["show", str(path)]) == 0
    assert "made for 48 tokens" in (out := capsys.readouterr().out)
    assert "mean over a text of 48 tokens" in out
    path.write_text(path.read_text().replace("context: 48\n", ""))
    assert main(["show", str(path)]) == 0
    assert "made for 256 tokens" in capsys.readouterr().out
