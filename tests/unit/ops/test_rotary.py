"""Rotary embedding: both layouts against code that nobody here wrote, and the phases of far positions."""

import math

import pytest
import torch
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as rotate_pairs
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves

from qkv.nn.positions import RoPEConfig
from qkv.ops.rotary import rotate
from qkv.tokens import Tokens
from tolerances import FLOAT64


def angles(length, width, theta=10_000.0):
    rate = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return torch.arange(length, dtype=torch.float64)[:, None] * rate


def test_half_layout_is_that_of_llama():
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    by = RoPEConfig().rotation(Tokens.full(2, 7), 8, torch.float64)
    twice = torch.cat([angles(7, 8)] * 2, -1)[None]
    want, _ = rotate_halves(x, x, twice.cos(), twice.sin(), unsqueeze_dim=2)
    torch.testing.assert_close(rotate(x, by), want, rtol=0, atol=FLOAT64)


def test_interleaved_layout_is_that_of_gptj():
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    by = RoPEConfig(layout="interleaved").rotation(Tokens.full(2, 7), 8, torch.float64)
    a = angles(7, 8)[None].expand(2, -1, -1)
    want = rotate_pairs(x, a.sin(), a.cos())
    torch.testing.assert_close(rotate(x, by), want, rtol=0, atol=FLOAT64)


def test_the_layouts_differ_by_a_permutation():
    x, tokens = torch.randn(1, 5, 2, 6), Tokens.full(1, 5)
    halves = RoPEConfig(layout="half").rotation(tokens, 6, torch.float32)
    pairs = RoPEConfig(layout="interleaved").rotation(tokens, 6, torch.float32)
    order = [0, 2, 4, 1, 3, 5]
    assert torch.equal(rotate(x, pairs)[..., order], rotate(x[..., order], halves))
    assert not torch.equal(rotate(x, pairs), rotate(x, halves))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_phases_are_right_far_out(dtype):
    """Law 9: at position 100,000, whatever the type of the model; Python's own arithmetic is the judge."""
    tokens = Tokens.full(1, 1, start=100_000)
    by = RoPEConfig(theta=500_000.0).rotation(tokens, 64, dtype)
    assert by.cos.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for pair in range(32):
        angle = 100_000 * 500_000.0 ** (-pair / 32)
        # A rounding of the result to float32; the product in float32 would be off by thousandths.
        assert by.cos[0, 0, pair].item() == pytest.approx(math.cos(angle), abs=1e-7)
        assert by.sin[0, 0, pair].item() == pytest.approx(-math.sin(angle), abs=1e-7)


def test_a_bfloat16_model_rotates_in_float32():
    x = torch.randn(1, 4, 2, 8).bfloat16()
    by = RoPEConfig().rotation(Tokens.full(1, 4, start=90_000), 8, torch.bfloat16)
    got, exact = rotate(x, by), rotate(x.double(), by)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()  # one rounding


def test_rows_that_start_at_different_places():
    by = RoPEConfig().rotation(Tokens.full(2, 3, start=torch.tensor([0, 5])), 8, torch.float64)
    torch.testing.assert_close(by.cos[1, :, :4], angles(8, 8)[5:].cos(), rtol=0, atol=FLOAT64)
    assert RoPEConfig().rotation(Tokens.full(2, 3), 8, torch.float64).cos.shape == (1, 3, 8)
