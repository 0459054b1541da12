"""Layers and blocks in a module of one's own, without a stack; and what they say to what does not fit."""

import subprocess
import sys

import pytest
import torch

from qkv.context import Memory
from qkv.masks import Causal, Full, Window
from qkv.models.stack import Stack
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.convolution import ConvolutionConfig
from qkv.nn.cross import CrossAttentionConfig
from qkv.nn.ffn import FFNConfig, GLUConfig
from qkv.nn.latent import LatentAttentionConfig
from qkv.nn.norms import RMSNormConfig
from qkv.nn.positions import RoPEConfig
from qkv.nn.recurrent import RecurrentConfig
from qkv.tokens import Tokens
from tolerances import FLOAT64

WIDTH = 16
NORM = RMSNormConfig()
ATTENTION = AttentionConfig(n_heads=2, mask=Causal(), position=RoPEConfig())
WINDOW = AttentionConfig(n_heads=4, mask=Causal() & Window(2), position=RoPEConfig(theta=10.0))
CROSS = CrossAttentionConfig(n_heads=2, mask=Full(), memory_dim=6)
LATENT = LatentAttentionConfig(
    n_heads=2, mask=Causal(), norm=NORM, kv_rank=8, plain_dim=6, rotary_dim=4, value_dim=6, position=RoPEConfig()
)
PARTS = [ATTENTION, WINDOW, CROSS, LATENT, FFNConfig(), GLUConfig(), ConvolutionConfig(), RecurrentConfig()]
PARTS += [PreNormConfig(norm=NORM, sublayers=(ATTENTION, CROSS, WINDOW, ConvolutionConfig(), GLUConfig()))]


def redrawn(module):
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module.double()


def memory(config, rows, n=4):
    return {"memory": torch.randn(rows, n, 6, dtype=torch.float64)} if "CrossAttention" in str(config) else {}


@pytest.mark.parametrize("config", PARTS, ids=lambda config: config.tag())
def test_padded_texts_are_what_each_is_alone(config):
    part, x = redrawn(config.build(WIDTH)), torch.randn(3, 7, WIDTH, dtype=torch.float64)
    there, lengths = memory(config, 3), [7, 2, 5]
    got, _ = part(x, Tokens.padded(lengths), **there)
    for row, n in enumerate(lengths):
        want, _ = part(x[row, None, :n], **{name: y[row, None] for name, y in there.items()})
        torch.testing.assert_close(got[row, :n], want[0], rtol=0, atol=FLOAT64)


def test_a_block_alone_is_a_stack_of_one():
    """Also where its layers have other masks and rotations than its first, and a memory with padding."""
    config = PARTS[-1]
    stack, x = redrawn(Stack(WIDTH, config)), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    block = config.build(WIDTH).double()
    block.load_state_dict(stack.blocks[0].state_dict())
    tokens, there = Tokens.padded([5, 3]), memory(config, 2)["memory"]
    for read in (there, Memory(there, Tokens.padded([2, 4]))):
        want, _ = stack.run(x, tokens, memory=read)
        torch.testing.assert_close(block(x, tokens, memory=read)[0], want, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (2, 5)], ids=str)
@pytest.mark.parametrize("config", PARTS, ids=lambda config: config.tag())
def test_no_rows_and_no_tokens(config, shape):
    part, x = config.build(WIDTH).double(), torch.randn(*shape, WIDTH, dtype=torch.float64, requires_grad=True)
    for tokens in (None, Tokens.padded([0] * shape[0], shape[1])):
        out, _ = part(x, tokens, **memory(config, shape[0]))
        assert out.shape == x.shape
        out.sum().backward()


WRONG = {
    "layer(x, torch.ones(2, 5))": "tokens is a Tensor; give Tokens.padded(lengths), or Tokens.from_padding(mask)",
    "model(ids, torch.ones(2, 5))": "tokens is a Tensor; give Tokens.padded(lengths), or Tokens.from_padding(mask)",
    "model(ids, [5, 3])": "tokens is a list; give Tokens.padded(lengths)",
    "layer(x, Tokens.padded([4, 3]))": "tokens are (2, 4) and inputs (2, 5) (B, T); make them equal",
    "layer(x[0])": "a layer reads (B, T, D) and was given (5, 16); give one text as x[None]",
    "vectors.loss(x[..., :6], x[0, :, :6])": "targets are (5, 6) and the outputs (2, 5, 6); give each token its target",
    "model(ids[0])": "the input is (5,) and must be (B, T) or (B, T, F); give one text as x[None]",
    "model(ids.float())": "token ids are whole numbers, (B, T), and these (2, 5) of torch.float32",
    "vectors(torch.randn(5, 6))": "vectors are (B, T, F) and these (5, 6); give one text as x[None]",
    "model.loss(ids, ids[:, :3])": "targets are (2, 3) and the outputs (2, 5); give each token its target",
    "model.loss(ids, ids.float())": "targets are of torch.float32 and must be ids such as torch.long",
    "cross(x)": "cross-attention reads a memory and was given none; give it memory=",
    "cross(x, memory=torch.randn(5, 16))": "memory is (5, 16); give vectors (B, S, M), or a Memory",
    "cross(x, memory=torch.randn(3, 5, 16))": "the memory has 3 rows and the stream 2; give each row its own",
    "cross(x, memory=[1])": "memory is list; give vectors (B, S, M), or a Memory",
}


def test_each_wrong_kind_is_one_line_that_says_what_to_give():
    """In a process of its own, as a user has it: in this one a checker of signatures would speak first."""
    script = f"""
import torch
from qkv import *
layer = AttentionConfig(n_heads=2, mask=Causal()).build(16)
cross = CrossAttentionConfig(n_heads=2, mask=Full()).build(16)
def model_of(embed, head):
    block = PreNormConfig(norm=RMSNormConfig(), sublayers=[AttentionConfig(n_heads=2, mask=Causal()), GLUConfig()])
    return TransformerConfig(d_model=16, embed=embed, blocks=block, final_norm=RMSNormConfig(), head=head).build()
model = model_of(TokenEmbedderConfig(vocab_size=20), LMHeadConfig())
vectors = model_of(VectorEmbedderConfig(n_features=6), VectorHeadConfig())
x, ids = torch.randn(2, 5, 16), torch.randint(0, 20, (2, 5))
for line in {list(WRONG)!r}:
    try:
        print(eval(line))
    except ConfigError as error:
        print(*str(error).splitlines(), sep="↵")
    except Exception as error:
        print(type(error), *str(error).splitlines())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    for line, said, want in zip(WRONG, done.stdout.splitlines(), WRONG.values(), strict=True):
        assert want in said, line
