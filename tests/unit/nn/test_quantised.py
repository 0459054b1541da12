"""Packed linear maps: against their own weights written out, and against rows alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv.errors import ConfigError
from qkv.models.transformer import TransformerConfig
from qkv.nn import quantised as quantised_module
from qkv.nn.quantised import HalfLinear, Int4Linear, Int8Linear, W8A8Linear, quantise, quantised
from qkv.ops import int4
from qkv.tokens import Tokens
from tiny import tiny_config, tiny_model, token_ids

BFLOAT16 = 2**-7
"""Relative to the sum of all terms without their signs: input, scales and output are each rounded to eight bits."""


def agree(got, x, weight, bias=None):
    want = torch.nn.functional.linear(x, weight, bias)
    size = x.abs() @ weight.abs().T + want.abs()
    assert ((got - want).abs() <= BFLOAT16 * size + 1e-6).all()


def relative(got, want):
    return ((got.float() - want).norm() / want.norm()).item()


def groups(n, k, seed):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), generator=g)
    scale, zero = torch.rand(n, k // 32, generator=g) + 0.1, torch.randn(n, k // 32, generator=g)
    weight = (codes.unflatten(1, (-1, 32)) * scale[..., None] + zero[..., None]).flatten(1)
    return codes, scale, zero, weight


@settings(max_examples=40, deadline=None)
@given(
    vectors=st.sampled_from([1, 2, 3, 17, int4._MANY, int4._MANY + 1, 97]), n=st.sampled_from([1, 16, 41, 64, 100]),
    groups_of=st.integers(1, 4), seed=st.integers(0, 99), bias=st.booleans(),
)  # fmt: skip
def test_four_bits_are_code_times_scale_plus_zero(vectors, n, groups_of, seed, bias):
    """For a few vectors and for many, rows that fill no block, weights whose middle is far from zero."""
    codes, scale, zero, weight = groups(n, 32 * groups_of, seed)
    b = torch.randn(n) if bias else None
    x = torch.randn(vectors, 32 * groups_of)
    layer = Int4Linear(int4.pack(codes, scale, zero), *codes.shape, b)
    agree(layer(x), x, weight, b)
    assert layer(x.view(1, vectors, -1)).shape == (1, vectors, n)


def test_few_and_many_vectors_give_the_same(monkeypatch):
    codes, scale, zero, weight = groups(128, 96, 0)
    layer, x = Int4Linear(int4.pack(codes, scale, zero), *codes.shape), torch.randn(int4._MANY, 96)
    many = layer(x)
    monkeypatch.setattr(int4, "_MANY", 10**9)
    # Few: vectors and results rounded to bfloat16.
    assert ((layer(x) - many).abs() <= 2**-8 * (x.abs() @ weight.abs().T + many.abs())).all()


def test_chunks_of_expanded_rows(monkeypatch):
    codes, scale, zero, weight = groups(640, 64, 1)
    monkeypatch.setattr(int4, "_EXPANDED", 4 * 64 * 64 * 3)  # three blocks of rows at once; ten do not divide
    x = torch.randn(int4._MANY, 64)
    agree(Int4Linear(int4.pack(codes, scale, zero), *codes.shape)(x), x, weight)


def test_where_the_layout_is_not_known_the_packed_product_runs(monkeypatch):
    codes, scale, zero, weight = groups(70, 64, 2)
    monkeypatch.setattr(int4, "_layout_is_known", lambda: False)
    monkeypatch.setattr(int4, "_columns", None)
    x = torch.randn(int4._MANY, 64)
    agree(Int4Linear(int4.pack(codes, scale, zero), *codes.shape)(x), x, weight)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 50), k=st.integers(1, 70), vectors=st.integers(1, 9), seed=st.integers(0, 99))
def test_eight_bits_of_any_size(n, k, vectors, seed):
    """PyTorch's product reads beyond the end of rows that are no multiple of 16."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g)
    layer = quantised(weight, None, "int8")
    assert isinstance(layer, Int8Linear)
    kept = layer.weight[:, :k].float() * layer.scale.float()[:, None]
    assert (kept - weight).abs().max() <= weight.abs().max() / 127  # half a step, and the rounding of the scale
    x = torch.randn(vectors, k, generator=g)
    agree(layer(x), x, kept)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 50), k=st.integers(1, 70), vectors=st.sampled_from([1, 2, 255, 256, 300]), seed=st.integers(0, 99)
)
def test_whole_numbers_times_whole_numbers(n, k, vectors, seed):
    """Each weight and each number of a vector is half a step off at most, whatever the size of its row or vector."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g) * torch.logspace(-3, 3, n)[:, None]
    x = torch.randn(vectors, k, generator=g) * torch.logspace(-3, 3, vectors)[:, None]
    layer = quantised(weight, None, "w8a8")
    assert isinstance(layer, W8A8Linear)
    step, size = weight.abs().amax(1) / 127, x.abs().amax(1, keepdim=True) / 127
    bound = x.abs().sum(1, keepdim=True) * step / 2 + size / 2 * (weight.abs().sum(1) + k * step / 2)
    got = layer(x)
    assert ((got - x @ weight.T).abs() <= bound * 1.001 + 1e-5 * (x.abs() @ weight.abs().T)).all()  # and of float32
    assert torch.equal(got[-1:], layer(x[-1:]))  # whatever stands beside it
    assert torch.equal(got, copy.deepcopy(layer)(x))


def test_where_the_packed_product_is_not_exact_the_other_gives_the_same(monkeypatch):
    layer, x = quantised(torch.randn(33, 50), torch.randn(33), "w8a8"), torch.randn(300, 50)
    got = layer(x)
    monkeypatch.setattr(quantised_module, "_has_packed_product", lambda: False)
    assert torch.equal(got, layer(x))


def test_a_vector_with_a_nan_is_nan_and_no_other():
    x = torch.randn(3, 8)
    x[1, 2] = torch.nan
    got = quantised(torch.randn(4, 8), torch.zeros(4), "w8a8")(x)
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


def test_four_bits_of_a_weight_are_its_nearest_steps():
    weight = torch.randn(6, 64)
    layer = quantised(weight, torch.ones(6), "int4")
    got = layer(torch.eye(64)).T - 1
    groups = weight.unflatten(1, (-1, 32))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    # Half a step, and the rounding of the result and of the scales to bfloat16.
    assert ((got.unflatten(1, (-1, 32)) - groups).abs() <= (0.55 * step + 0.02)[..., None]).all()


def test_float16_never_overflows():
    """Vectors and sums far beyond 65504, one by one and several at once."""
    weight, x = torch.randn(5, 40), torch.randn(3, 40) * 1e6
    x[1] = 0
    layer = HalfLinear(weight)
    for got in (layer(x), torch.cat([layer(row[None]) for row in x])):
        assert relative(got, x @ weight.T) < 2**-9  # three roundings to eleven bits
        assert (got[1] == 0).all()


def test_chunks_of_widened_rows(monkeypatch):
    weight, x = torch.randn(50, 40).half(), torch.randn(3, 40)
    monkeypatch.setattr(quantised_module, "_WIDENED", 4 * 40 * 8)  # eight rows at once; fifty do not divide
    torch.testing.assert_close(HalfLinear(weight)(x), x @ weight.float().T)


def test_rows_of_zeros_and_equal_weights():
    for width in ("int8", "int4", "w8a8"):
        x = torch.randn(3, 32)
        assert (quantised(torch.zeros(4, 32), None, width)(x) == 0).all()
        got = quantised(torch.full((4, 32), 0.75), None, width)(x)
        # Of w8a8, half a step of a vector in each of its numbers.
        atol = 0.02 if width != "w8a8" else 0.75 * 32 * x.abs().max().item() / 127 / 2
        torch.testing.assert_close(got, 0.75 * x.sum(1, keepdim=True).expand(3, 4), rtol=0.02, atol=atol)


def test_what_packed_weights_cannot_do():
    layer = quantised(torch.randn(4, 32), None, "int4")
    with pytest.raises(ConfigError, match="packed weights give no gradients; load the model with a dtype"):
        layer(torch.randn(2, 32, requires_grad=True))
    with pytest.raises(ConfigError, match="run on the CPU and x is on meta"):
        layer(torch.randn(2, 32, device="meta"))
    with pytest.raises(ConfigError, match="rows of 24 weights are not whole groups of 32; use int8"):
        quantised(torch.randn(4, 24), None, "int4")


@pytest.mark.parametrize("width", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model(width, tied):
    """It decodes with a cache, and each row of a ragged batch is the row alone."""
    data = tiny_config(tied=tied).to_dict() | {"d_model": 32}
    data["blocks"]["pattern"]["sublayers"][1]["d_ff"] = 64
    model = tiny_model(torch.float32, config=TransformerConfig.from_dict(data))
    ids = token_ids(2, 9)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        quantise(model, width)
        for name, part in model.named_modules():
            if isinstance(part, Int4Linear | Int8Linear):
                twin.get_submodule(name).weight.copy_(part(torch.eye(part.in_features)).T)
        got = model(ids)
        # Inputs and outputs of every product are rounded to bfloat16, in two layers of wide random weights.
        assert relative(got, twin(ids)) < 0.05
        ragged = model(ids, Tokens.padded([9, 4]))
        # Sums in another order, rounded to bfloat16 on the way.
        assert relative(ragged[1, :4], model(ids[1:, :4])[0]) < 0.02
        cache = model.make_cache(2, 9)
        steps = torch.cat(
            [model(ids[:, :5], cache=cache), *(model(ids[:, i : i + 1], cache=cache) for i in range(5, 9))], 1
        )
        assert relative(steps, got) < 0.02
        with pytest.raises(ConfigError, match="a packed head has no loss"):
            model.loss(ids[:, :-1], ids[:, 1:])


def test_the_layer_that_cannot_be_packed_is_named():
    with pytest.raises(ConfigError, match=r"blocks\.0\.sublayers\.attention\.qkv_proj: rows of 16 weights .* use int8"):
        quantise(tiny_model(torch.float32), "int4")
