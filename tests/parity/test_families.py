"""Every family, in and out: a tiny random model of `transformers` is read by qkv, written by it, and read again there.

The weights are large, so that a wrong pairing of heads, window, norm or soft-cap shows in the logits.
"""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

import qkv
from drawn import DECODERS, drawn_config, wide_weights
from qkv.checkpoints.families import FAMILIES, family_of
from qkv.checkpoints.families.config_reader import ConfigReader
from qkv.checkpoints.families.family import layers_of
from qkv.checkpoints.huggingface import load_model, save_model
from qkv.errors import ConfigError
from qkv.presets import preset
from qkv.tokens import Tokens
from tolerances import FLOAT64, HF_FLOAT32_INSIDE

LENGTH, VOCAB = 23, 61
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 36, "intermediate_size": 41, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-3, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.75}
LONGROPE |= {"short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}
GEMMA = {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 10}
NEOX = {
    "vocab_size": VOCAB, "hidden_size": 40, "intermediate_size": 43, "num_hidden_layers": 3, "num_attention_heads": 5,
    "max_position_embeddings": 64, "layer_norm_eps": 1e-3, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip

CASES = {
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 30, "n_layer": 3, "n_head": 5}),
    "gpt2, untied, no scale": (
        "gpt2",
        {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 30, "n_layer": 2, "n_head": 5, "n_inner": 37,
         "tie_word_embeddings": False, "scale_attn_weights": False, "activation_function": "gelu"},
    ),
    "llama": ("llama", COMMON | {"rope_parameters": ROPE}),
    "llama, biases, wide heads, yarn": (
        "llama",
        COMMON | {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True, "head_dim": 14},
    ),
    "llama, tied, linear": (
        "llama",
        COMMON | {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 3.0}, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", COMMON | {"rope_parameters": ROPE, "sliding_window": 5}),
    "mistral, no window, wide heads": (
        "mistral", COMMON | {"rope_parameters": ROPE, "sliding_window": None, "head_dim": 10}
    ),
    "qwen2": ("qwen2", COMMON | {"rope_parameters": ROPE, "tie_word_embeddings": True}),
    "qwen2, windows in late layers": (
        "qwen2",
        COMMON | {"rope_parameters": YARN, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", COMMON | {"rope_parameters": ROPE, "head_dim": 10}),
    "qwen3, biases, windows by list": (
        "qwen3",
        COMMON | {"rope_parameters": ROPE, "head_dim": 6, "attention_bias": True, "use_sliding_window": True,
                  "sliding_window": 4, "tie_word_embeddings": True,
                  "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "olmo3": (
        "olmo3",
        COMMON | {"num_hidden_layers": 5, "sliding_window": 5, "rope_parameters": {
            "full_attention": YARN, "sliding_attention": ROPE}},
    ),
    "olmo3, biases, tied, windows by list": (
        "olmo3",
        COMMON | {"attention_bias": True, "tie_word_embeddings": True, "sliding_window": 4,
                  "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "gemma": ("gemma", COMMON | {"head_dim": 8, "rope_parameters": ROPE}),
    "gemma, its first activation, biases, untied, linear": (
        "gemma",
        COMMON | {"head_dim": 10, "hidden_act": "gelu", "attention_bias": True, "tie_word_embeddings": False,
                  "rope_parameters": ROPE | {"rope_type": "linear", "factor": 3.0}},
    ),
    "gemma2": (
        "gemma2",
        COMMON | GEMMA | {"rope_parameters": ROPE, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2, no caps, biases, untied, four layers": (
        "gemma2",
        COMMON | GEMMA | {"rope_parameters": ROPE, "attn_logit_softcapping": None, "final_logit_softcapping": None,
                          "attention_bias": True, "tie_word_embeddings": False, "num_hidden_layers": 4,
                          "query_pre_attn_scalar": 8},
    ),
    "gemma3": (
        "gemma3_text",
        COMMON | GEMMA | {"num_hidden_layers": 7, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 900.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
        }},
    ),
    "phi3": ("phi3", COMMON | {"rope_parameters": ROPE, "sliding_window": 5}),
    "phi3, part of a head, short": (
        "phi3",
        COMMON | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
    "phi3, part of a head, long": (
        "phi3",
        COMMON | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16, "tie_word_embeddings": True},
    ),
    "olmo2": ("olmo2", COMMON | {"rope_parameters": ROPE}),
    "olmo2, biases, tied, yarn": (
        "olmo2",
        COMMON | {"rope_parameters": YARN, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "gpt_neox": ("gpt_neox", NEOX | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}),
    "gpt_neox, one after the other, no biases, tied": (
        "gpt_neox",
        NEOX | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.3}, "use_parallel_residual": False,
                "attention_bias": False, "tie_word_embeddings": True, "num_attention_heads": 4,
                "hidden_size": 28, "hidden_act": "gelu_new"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES.values(), ids=[name.replace(",", "").replace(" ", "-") for name in CASES])
def saved(request, tmp_path_factory):
    """A family's name, a model of it with wide weights, the folder where it is saved, and what qkv reads there."""
    (kind, settings), folder = request.param, tmp_path_factory.mktemp("theirs")
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Norm weights around 1 (around 0 where 1 is added to them), the rest around 0: all parts show.
            around = 1.0 if ("norm" in name or "ln_" in name) and "gemma" not in kind else 0.0
            p.normal_(std=0.25).add_(around)
    model.save_pretrained(folder)
    return kind, model, folder, load_model(folder)


def agree(got, want):
    assert want.std() > 0.4, "the reference is too tame to show a wrong convention"
    torch.testing.assert_close(got, want, rtol=0, atol=HF_FLOAT32_INSIDE)


def token_ids(*shape):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_in_and_out(saved, tmp_path):
    (kind, theirs, folder, ours), ids = saved, token_ids(2, LENGTH)
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    want = theirs(ids).logits
    agree(ours(ids), want)

    save_model(ours, tmp_path / "ours", family=kind)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert type(again) is type(theirs)
    assert again.dtype == torch.float64
    # Not bit for bit: how a product is added up may depend on where its factors lie in memory.
    torch.testing.assert_close(again.eval()(ids).logits, want, rtol=0, atol=FLOAT64)
    a, b = (load_file(side / "model.safetensors") for side in (folder, tmp_path / "ours"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert load_model(tmp_path / "ours").config == ours.config


@torch.no_grad()
def test_a_ragged_batch_and_more_tokens_from_the_cache(saved):
    """Rows padded left, against each row alone and at once; the windows are shorter than the texts."""
    (_, theirs, _, ours), ids, lengths, n = saved, token_ids(2, 14), (11, 4), 11
    want = [theirs(ids[row : row + 1, n - lengths[row] :]).logits[0] for row in range(2)]
    cache = ours.make_cache(2, 16)
    first = ours(ids[:, :n], Tokens.padded(lengths, side="left"), cache=cache)
    for row, length in enumerate(lengths):
        agree(first[row, n - length :], want[row][:length])
    for i in range(n, 14):
        step = ours(ids[:, i : i + 1], cache=cache)[:, 0]
        agree(step, torch.stack([want[row][lengths[row] + i - n] for row in range(2)]))


PRESETS_AND_FAMILIES = {
    "mistral-7b": "mistral", "qwen2.5-0.5b": "qwen2", "qwen3-0.6b": "qwen3", "phi3-mini": "phi3",
    "gemma2-2b": "gemma2", "olmo2-1b": "olmo2", "pythia-160m": "gpt_neox", "llama3-8b": "llama", "gpt2": "gpt2",
}  # fmt: skip


@pytest.mark.parametrize(("name", "family"), PRESETS_AND_FAMILIES.items())
def test_presets_have_as_many_parameters_as_theirs(name, family):
    config = preset(name)
    data = FAMILIES[family].write(config)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**data | {"pad_token_id": None})
        )
        ours = config.build()
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    want = {name: x.shape for name, x in theirs.state_dict().items()}
    head = want.pop("lm_head.weight")
    if not config.head.tied:
        want[FAMILIES[family].head] = head  # GPT-NeoX has another name for it in files
    written = FAMILIES[family].keys(config).to_theirs(ours.state_dict())
    assert {name: x.shape for name, x in written.items()} == want


def test_a_config_is_written_as_it_was_read(saved):
    (kind, _, folder, _) = saved
    data, family = json.loads((folder / "config.json").read_text()), FAMILIES[kind]
    config = family.read(ConfigReader(data, "theirs"))
    written = family.write(config)
    assert family.read(ConfigReader(json.loads(json.dumps(written)), "ours")) == config
    with pytest.raises(Exception, match="'strange' is not known to qkv, and it might change what the model computes"):
        family.read(ConfigReader(data | {"strange": 1}, "x"))
    assert family_of(config).write(config)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_which_layers_have_windows_where_no_list_says_so(kind):
    settings = COMMON | {"num_hidden_layers": 9, "sliding_window": 5}
    settings |= {"use_sliding_window": True, "max_window_layers": 3} if "qwen" in kind else {}
    data = transformers.AutoConfig.for_model(kind, **settings).to_dict()
    theirs = data.pop("layer_types")
    config = FAMILIES[kind].read(ConfigReader(data, "x"))
    ours = [block.sublayers[0].mask.reach for block in layers_of(config)]
    assert ours == [5 if name == "sliding_attention" else None for name in theirs]


def written_as_computed(model, kind, folder):
    """What `transformers` computes from the files is what the model computes, and what qkv reads there."""
    save_model(model, folder, family=kind)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), (report, model.config)
    ids = token_ids(2, 22)
    want = theirs.eval()(ids).logits
    for ours in (model, load_model(folder)):
        assert (ours(ids) - want).abs().max() < HF_FLOAT32_INSIDE * want.abs().max().clamp(1), model.config


SCALED = {
    "linear, a context that is no multiple": ("llama", qkv.LinearScalingConfig(factor=3.0), None, 100),
    "dynamic, a context that is not the factor's": (
        "llama", qkv.DynamicNTKScalingConfig(factor=4.0, original_length=16), None, 100
    ),
    "yarn, a context below the factor's": ("mistral", qkv.YaRNScalingConfig(factor=4.0, original_length=16), 5, 50),
    "gemma2, no window": ("gemma2", None, None, 64),
    "gemma3, no window": ("gemma3_text", None, None, 64),
    "gemma3, longrope": (
        "gemma3_text",
        qkv.LongRoPEScalingConfig(original_length=16, short_factors=[1.0, 1.3, 2.0, 1.1], long_factors=[3.0] * 4),
        None,
        64,
    ),
    "gemma3, dynamic": ("gemma3_text", qkv.DynamicNTKScalingConfig(factor=4.0, original_length=16), None, 100),
    "gemma3, scaled in windows": ("gemma3_text", qkv.YaRNScalingConfig(factor=4.0, original_length=16), 5, 64),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", SCALED.values(), ids=[name.replace(",", "").replace(" ", "-") for name in SCALED])
def test_models_of_ours_are_written_as_they_compute(case, tmp_path):
    kind, scaling, window, context = case
    sizes = {key: COMMON[key] for key in COMMON if not key.endswith("_id")} | {
        "head_dim": 8,
        "sliding_window": window or 4,
    }
    rope = qkv.RoPEConfig(theta=500.0, scaling=scaling)
    mask = qkv.Causal() & qkv.Window(size=window) if window else qkv.Causal()
    if kind == "llama":
        del sizes["sliding_window"]
    config = FAMILIES[kind].parse(sizes, "x")
    first = layers_of(config)[0]
    attention = first.sublayers[0].replace(mask=mask, position=rope)
    block = first.replace(sublayers=(attention, first.sublayers[1]))
    config = config.replace(blocks=qkv.Repeat(n=2, pattern=block), context=context)
    written_as_computed(wide_weights(config.build().double(), 1), kind, tmp_path / "ours")


DRAWS = 12


@torch.no_grad()
@pytest.mark.parametrize("kind", DECODERS)
def test_a_drawn_model_is_written_right_or_refused_in_a_line(kind, tmp_path):
    written = 0
    for seed in range(DRAWS):
        config, folder, refusal = drawn_config(kind, seed), tmp_path / str(seed), ""
        try:
            FAMILIES[kind].write(config)
        except ConfigError as error:
            refusal = str(error)
        assert re.fullmatch(rf"({kind} cannot express this model: .{{20,160}})?", refusal), config
        if not refusal:
            written += 1
            written_as_computed(wide_weights(config.build().double(), seed), kind, folder)
            shutil.rmtree(folder)
    assert written >= DRAWS // 4
