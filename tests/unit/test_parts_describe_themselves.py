"""Toy parts, defined here alone, are drawn, counted, checked, adapted and quantised: nothing lists classes."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from qkv.cli import main
from qkv.config import config
from qkv.cost import summary
from qkv.errors import ConfigError
from qkv.masks import Causal
from qkv.models.stack import Repeat
from qkv.models.transformer import TransformerConfig
from qkv.nn.adapters import LoRAConfig, add_adapters
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import Block, BlockConfig, PreNormConfig
from qkv.nn.convolution import ConvolutionConfig
from qkv.nn.embedders import Embedder, EmbedderConfig, TokenEmbedderConfig
from qkv.nn.heads import Head, HeadConfig, LMHeadConfig, VectorHeadConfig
from qkv.nn.norms import Norm, NormConfig, RMSNormConfig
from qkv.nn.positions import PositionTable, PositionTableConfig
from qkv.nn.quantised import Int8Linear, quantise
from qkv.nn.recurrent import RecurrentConfig
from qkv.nn.sublayer import Sublayer, SublayerConfig, in_turn
from qkv.yaml_files import dump_yaml
from tiny import tiny_model


@config
class ToyMapConfig(SublayerConfig):
    """Each token on its own."""

    name: ClassVar[str] = "toy"

    width: int = 5
    twice: bool = False


class ToyMap(Sublayer, config=ToyMapConfig):
    def __init__(self, config, d_model):
        super().__init__(config)
        self.in_proj = nn.Linear(d_model, config.width, bias=False)
        self.o_proj = nn.Linear(config.width, d_model, bias=False)

    def update(self, x, ctx):
        return self.o_proj(self.in_proj(x).relu()), None

    def residual_weights(self):
        return [self.o_proj.weight]


@config
class ToyScaleConfig(NormConfig):
    pass


class ToyScale(Norm, config=ToyScaleConfig):
    def __init__(self, config, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x


@config
class ToyPlainConfig(BlockConfig):
    pass


class ToyPlain(Block, config=ToyPlainConfig):
    def equation(self, x, sublayers):
        for f in sublayers:
            x = x + f(x)
        return x


@config
class ToyStepConfig(PositionTableConfig):
    pass


class ToyStep(PositionTable, config=ToyStepConfig):
    def __init__(self, config, d_model):
        super().__init__()

    def forward(self, tokens, dtype):
        return tokens.index[..., None].to(dtype) / 100


@config
class ToyBitsConfig(EmbedderConfig):
    """The bits of a number; it takes 8 of them where nobody says how many."""

    bits: int | None = None

    @property
    def left_open(self):
        return "set by the toy" if self.bits is None else ""

    def closed(self):
        return ToyBitsConfig(bits=self.bits or 8, position=self.position)


class ToyBits(Embedder, config=ToyBitsConfig):
    def __init__(self, config, d_model):
        super().__init__(config, d_model)
        self.proj = nn.Linear(config.bits, d_model)
        self.scale = nn.Parameter(torch.ones(()))

    def embed(self, inputs):
        powers = 2 ** torch.arange(self.proj.in_features, device=inputs.device)
        return self.proj((inputs[..., None] // powers % 2) * self.scale)

    @property
    def table(self):
        return None

    def example(self, batch, length, generator):
        return torch.randint(2**self.proj.in_features, (batch, length), generator=generator)


@config
class ToyHeadConfig(HeadConfig):
    def build(self, d_model, embed):
        return ToyHead(d_model)


class ToyHead(Head):
    def __init__(self, d_model):
        super().__init__()
        self.proj = nn.Linear(d_model, 2)

    def forward(self, x, tokens, table):
        return self.proj(x)

    def loss(self, x, tokens, table, targets, scale):
        return self.proj(x).sum() * scale

    def count(self, targets, tokens):
        return int(tokens.valid.sum())


def toy(bits=4, block=ToyPlainConfig):
    attention = AttentionConfig(n_heads=2, mask=Causal())
    return TransformerConfig(
        d_model=8,
        embed=ToyBitsConfig(bits=bits, position=ToyStepConfig()),
        blocks=Repeat(n=2, pattern=block(norm=ToyScaleConfig(), sublayers=(ToyMapConfig(twice=True), attention))),
        final_norm=ToyScaleConfig(),
        head=ToyHeadConfig(),
    )


DRAWN = """\
     │  inputs  (T, …)
╭────┴─ embed ─────────────────────────────────────────────── 41 parameters ─╮
│ ToyBits(bits=4)                                                            │
│ + ToyStep                                                                  │
     │  x  (T, 8)
╭────┴─ 2 × ToyPlain ─────────────────────────────────────── 672 parameters ─╮
│    │  ToyPlain    norm: ToyScale                                           │
│    ├─▸ toy ─╮                           ToyMap(twice=True)                 │
│    ⊕◂───────╯                                                              │
│    ├─▸ attention ─╮                     2 heads of 4                       │
╭────┴─ final norm: ToyScale ───────────────────────────────── 8 parameters ─╮
╭────┴─ head: ToyHead ─────────────────────────────────────── 18 parameters ─╮
│ ToyHead                                                                    │
     │  outputs  (T, …)
"""


def show(path, capsys, config):
    path.write_text(dump_yaml(config.to_dict()))
    assert main(["show", str(path)]) == 0
    return capsys.readouterr().out


def test_toy_parts_are_drawn_and_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = show(tmp_path / "toy.yaml", capsys, toy()).splitlines()
    assert [line for line in DRAWN.splitlines() if line not in lines] == []
    cost = summary(toy())
    assert cost.parameters == sum(p.numel() for p in toy().build().parameters())
    assert cost.parts[1].parts[1].flops == 2 * 2 * (8 * 5 + 5 * 8)  # two layers, two per weight
    assert cost.parts[0].flops == 2 * 4 * 8
    assert summary(toy(bits=None)).parts[0].open == "set by the toy"


def test_the_formula_is_the_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ToyPlainConfig, "formula", "x = norm(x + norm(f(norm(x))))")
    out = show(tmp_path / "toy.yaml", capsys, toy())
    assert "├─▸ norm ─▸ toy ─▸ norm ─╮" in out
    assert out.count("│    norm  ") == 2


def test_toy_parts_are_checked_against_the_laws(tmp_path, capsys):
    (tmp_path / "toy.yaml").write_text(dump_yaml(toy(bits=None).to_dict()))
    assert main(["check", str(tmp_path / "toy.yaml"), "--dtype", "float64"]) == 0
    assert capsys.readouterr().out.count("holds") == 11


@config
class ToyPoolConfig(HeadConfig):
    def build(self, d_model, embed):
        return ToyPool(d_model)


class ToyPool(ToyHead):
    def forward(self, x, tokens, table):
        return self.proj((x * tokens.valid[..., None]).sum(1))


def test_a_head_that_pools_leaves_the_laws_the_stream(tmp_path, capsys):
    model = toy().replace(head=ToyPoolConfig())
    assert model.build()(torch.randint(16, (3, 5))).shape == (3, 2)
    (tmp_path / "toy.yaml").write_text(dump_yaml(model.to_dict()))
    assert main(["check", str(tmp_path / "toy.yaml"), "--dtype", "float64"]) == 0
    assert capsys.readouterr().out.count("holds") == 12


def test_what_nobody_can_draw_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ToyBits, "example", Embedder.example)
    (tmp_path / "toy.yaml").write_text(dump_yaml(toy().to_dict()))
    assert main(["check", str(tmp_path / "toy.yaml")]) == 2
    assert "no input can be drawn for a model with the embedder ToyBits" in capsys.readouterr().err


def test_toy_parts_are_quantised_but_for_what_they_keep(monkeypatch):
    model = toy().build()
    monkeypatch.setattr(ToyMap, "left_wide", lambda self: [self.in_proj.weight])
    ids = torch.randint(16, (2, 5))
    before = model(ids)
    quantise(model, "int8")
    part = model.blocks[0].sublayers["toy"]
    assert isinstance(part.in_proj, nn.Linear)
    assert isinstance(part.o_proj, Int8Linear)
    assert (model(ids) - before).abs().max() < 0.1 * before.abs().max()


class ToyExperts(Sublayer):
    """Four maps, of which one acts on a token."""

    def __init__(self):
        super().__init__(ToyMapConfig())
        self.experts = nn.Parameter(torch.zeros(4, 8, 8))

    def update(self, x, ctx):
        return x @ self.experts[0], None

    def residual_weights(self):
        return []

    def slices(self):
        return {"experts": in_turn(1, up=8)}

    def active_parameters(self):
        return 8 * 8


def test_weights_with_three_axes_are_refused_by_name():
    model = tiny_model(torch.float32)
    model.blocks[0].sublayers["ffn"] = ToyExperts()
    with pytest.raises(ConfigError, match=r"ToyExperts\.experts is no linear map, so no adapter fits on up"):
        add_adapters(model, LoRAConfig(targets=("q", "up")))
    with pytest.raises(ConfigError, match=r"blocks\.0\.sublayers\.ffn: ToyExperts\.experts has 3 axes"):
        quantise(model, "int8")


def test_adapters_sit_on_slices_of_a_toy(monkeypatch):
    monkeypatch.setattr(ToyMap, "slices", lambda self: {"o_proj": in_turn(1, down=8)})
    model, ids = toy().build(), torch.randint(16, (2, 5))
    before = model(ids)
    add_adapters(model, LoRAConfig(targets=("down",)))
    assert torch.equal(model(ids), before)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"blocks.{i}.sublayers.toy.o_proj.lora_{x}.down" for i in range(2) for x in "ab"
    ]


def test_experts_that_rest_are_told_from_those_that_act(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ToyMap, "active_parameters", lambda self: 30)
    cost = summary(toy())
    assert cost.parameters - cost.active_parameters == 2 * (80 - 30)
    assert f"Of the parameters {cost.active_parameters:,} act on a token." in show(tmp_path / "x.yaml", capsys, toy())


def test_states_are_counted(tmp_path, capsys):
    sublayers = (ConvolutionConfig(width=4), RecurrentConfig(d_hidden=6, layers=2))
    blocks = Repeat(n=3, pattern=PreNormConfig(norm=RMSNormConfig(), sublayers=sublayers))
    config = TransformerConfig(d_model=8, embed=TokenEmbedderConfig(vocab_size=5), blocks=blocks)
    cost = summary(config, dtype=torch.bfloat16)
    assert cost.state_bytes == 2 * 3 * (3 * 8 + 2 * 6)
    assert cost.cache_bytes_per_token == 0
    out = show(tmp_path / "x.yaml", capsys, config)
    assert "Besides, a cache keeps 432 B of each text, however long it is." in out


def test_sizes_that_the_data_set():
    assert TokenEmbedderConfig().for_vocabulary(7).vocab_size == 7
    with pytest.raises(ConfigError, match=r"the data are vectors and model.embed is TokenEmbedder; use VectorEmbedder"):
        TokenEmbedderConfig().for_vectors(3)
    with pytest.raises(ConfigError, match=r"the data are text and model.embed is ToyBits; use TokenEmbedder"):
        ToyBitsConfig().for_vocabulary(3)
    with pytest.raises(ConfigError, match=r"the data are text and model.head is VectorHead; use LMHead"):
        VectorHeadConfig().for_vocabulary(3)
    assert LMHeadConfig().for_vocabulary(3) == LMHeadConfig()
