"""A stack, its layers one by one, and what they report."""

from typing import ClassVar, final

import pytest
import torch

from qkv.config import config
from qkv.context import Memory
from qkv.masks import Causal, Full, Window
from qkv.models.encoder_decoder import EncoderDecoderConfig
from qkv.models.pairs import Pair
from qkv.models.stack import Repeat, Stack
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.cross import CrossAttentionConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.norms import RMSNormConfig
from qkv.nn.positions import RoPEConfig
from qkv.nn.sublayer import Aux, Sublayer, SublayerConfig
from qkv.tokens import Tokens
from tolerances import FLOAT64

NORM = RMSNormConfig()
WIDTH = 16


def attention(mask, theta):
    return AttentionConfig(n_heads=2, mask=mask, position=RoPEConfig(theta=theta))


def block(*sublayers):
    return PreNormConfig(norm=NORM, sublayers=sublayers)


def redrawn(module):
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module.double()


def test_a_layer_of_a_stack_runs_alone():
    """It has a seat for the second mask and rotation of the stack, and its own are the only ones."""
    sublayers = (attention(Causal(), 100.0), attention(Causal() & Window(size=3), 10.0), FFNConfig())
    stack = redrawn(Stack(WIDTH, block(*sublayers)))
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    for inside, made_from in zip(stack.blocks[0].sublayers.values(), sublayers, strict=True):
        alone = made_from.build(WIDTH).double()
        alone.load_state_dict(inside.state_dict())
        torch.testing.assert_close(inside(x)[0], alone(x)[0], rtol=0, atol=FLOAT64)


def test_two_cross_attentions_both_read():
    cross = CrossAttentionConfig(n_heads=2, mask=Full())
    stack = redrawn(Stack(WIDTH, block(cross, cross)))
    assert list(stack.blocks[0].sublayers) == ["cross_attention", "cross_attention_2"]
    x, there = torch.randn(2, 4, WIDTH, dtype=torch.float64), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    memory = Memory(there.requires_grad_(), Tokens.full(2, 5))
    out, _ = stack.run(x, Tokens.full(2, 4), memory=memory)
    gradients = torch.autograd.grad(out.sum(), [part.kv_proj.weight for part in stack.blocks[0].sublayers.values()])
    assert all(g.abs().max() > 0 for g in gradients)


@final
@config
class ReportConfig(SublayerConfig):
    """Reports the sum of what it reads, and how many tokens."""

    name: ClassVar[str] = "report"

    def build(self, d_model):
        return Report(self)


@final
class Report(Sublayer):
    def update(self, x, ctx):
        return torch.zeros_like(x), Aux({"size": x.sum()}, {"load": torch.tensor([x.shape[0] * x.shape[1]])})

    def residual_weights(self):
        return []

    def flops(self, n_keys):
        return 0


@pytest.mark.parametrize("shared", [False, True])
def test_reports_are_named_by_their_place_in_the_stack(shared):
    stack = redrawn(Stack(WIDTH, Repeat(n=3, pattern=block(FFNConfig(), ReportConfig()), shared=shared)))
    _, aux = stack.run(torch.randn(2, 4, WIDTH, dtype=torch.float64), Tokens.full(2, 4))
    if shared:  # one layer, three times
        assert {name: load.tolist() for name, load in aux.loads.items()} == {"blocks.0.report.load": [24]}
    else:
        assert {name: load.tolist() for name, load in aux.loads.items()} == {
            f"blocks.{i}.report.load": [8] for i in range(3)
        }
    assert set(aux.losses) == {name.replace("load", "size") for name in aux.loads}


def test_what_an_encoder_reports_is_not_lost():
    read = block(attention(Full(), 100.0), ReportConfig())
    write = block(attention(Causal(), 100.0), CrossAttentionConfig(n_heads=2, mask=Full()), ReportConfig())
    embed = TokenEmbedderConfig(vocab_size=7)
    model = EncoderDecoderConfig(d_model=WIDTH, source=embed, target=embed, encoder=read, decoder=write).build()
    ids = torch.ones(2, 5, dtype=torch.long)
    _, aux = model.loss(Pair(ids, Tokens.full(2, 5), ids[:, :3]), ids[:, :3])
    assert {name: load.item() for name, load in aux.loads.items()} == {
        "encoder.blocks.0.report.load": 10,
        "decoder.blocks.0.report.load": 6,
    }
