"""The laws of `attend`, on every backend that honours what is asked."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv.errors import ConfigError
from qkv.lowered import SHORT, Form, lower
from qkv.masks import Causal, Chunked, Full, Strided, Window
from qkv.ops import attend, attention_weights, kernels_used
from qkv.tokens import Tokens
from tolerances import FLOAT64

MASKS = [
    Full(),
    Causal(),
    Window(size=3),
    Causal() & Window(size=2),
    Chunked(size=3),
    ~Causal(),
    Causal() | Chunked(size=2),
]


def draw(batch=2, heads=4, groups=2, queries=5, keys=None, width=8, values=None, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    q = torch.randn(batch, heads, queries, width, generator=g, dtype=dtype)
    k = torch.randn(batch, groups, keys, width, generator=g, dtype=dtype)
    v = torch.randn(batch, groups, keys, values or width, generator=g, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v)]


def by_loops(q, k, v, allowed):
    """The formula, one query at a time: nothing shared with the library."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        group = h // (q.shape[1] // k.shape[1])
        seen = [s for s in range(k.shape[2]) if allowed(b, t, s)]
        if seen:
            scores = torch.stack([q[b, h, t] @ k[b, group, s] for s in seen]) / math.sqrt(q.shape[-1])
            out[b, h, t] = scores.softmax(0) @ v[b, group, seen]
    return out


@settings(max_examples=200, deadline=None)
@given(
    queries=st.integers(1, 7), past=st.integers(0, 4), groups=st.sampled_from([1, 2, 4]), mask=st.sampled_from(MASKS),
    values=st.sampled_from([8, 6]), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_backend_is_the_formula(queries, past, groups, mask, values, seed):
    """Laws 4, 5 and 7: alignment when T != S, polarity, pairing of heads."""
    q, k, v = draw(groups=groups, queries=queries, keys=queries + past, values=values, seed=seed)

    def allowed(b, t, s):
        i, j = t + past, s
        table = {
            "Full": True, "Causal": j <= i, "Window": abs(i - j) < 3, "Chunked": i // 3 == j // 3, "Not": j > i,
            "And": j <= i and i - j < 2, "Or": j <= i or i // 2 == j // 2,
        }  # fmt: skip
        return table[type(mask).__name__]

    want = by_loops(q, k, v, allowed)
    for backend in ("reference", "sdpa", "auto"):
        got = attend(q, k, v, mask=mask, backend=backend)
        torch.testing.assert_close(got, want, rtol=0, atol=FLOAT64)


def test_masks_drawn():
    def picture(mask, tokens=6):
        return mask.draw(tokens).splitlines()

    assert picture(Causal()) == ["█·····", "██····", "███···", "████··", "█████·", "██████"]
    assert picture(Causal() & Window(size=2)) == ["█·····", "██····", "·██···", "··██··", "···██·", "····██"]
    assert picture(Window(size=2), 4) == ["██··", "███·", "·███", "··██"]
    assert picture(Chunked(size=4)) == ["████··"] * 4 + ["····██"] * 2
    assert picture(Strided(stride=3)) == ["█··█··", "·█··█·", "··█··█"] * 2
    assert picture(~Causal()) == ["·█████", "··████", "···███", "····██", "·····█", "······"]
    assert picture(Full()) == ["██████"] * 6
    assert picture(Causal(), Tokens.packed([[2, 3]], 6)) == ["█·····", "██····", "··█···", "··██··", "··███·", "······"]
    assert picture(Causal(), 128)[:2] == ["▒" + "·" * 63, "█▒" + "·" * 62]


def test_order_makes_a_prefix():
    """Equal ranks see each other: a prefix, an image block."""
    from qkv.masks import dense
    from qkv.tokens import Layout

    tokens = replace(Tokens.full(1, 4), order=torch.tensor([[0, 0, 1, 2]]), layout=Layout.GENERAL)
    assert dense(Causal(), tokens, tokens)[0, 0].int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    assert lower(Causal(), tokens, tokens).form is Form.DENSE


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_query_that_sees_nothing_gives_zero_and_finite_gradients(backend):
    """Law 2."""
    q, k, v = draw()
    tokens, padded = Tokens.full(2, 5), Tokens.from_padding(torch.tensor([[1, 1, 0, 1, 1], [1] * 5]).bool())
    mask = replace(lower(Causal(), padded, tokens), query_valid=None)
    out = attend(q, k, v, mask=mask, backend=backend)
    assert (out[0, :, 2] == 0).all()
    assert (out[0, :, 3] != 0).any()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert (q.grad[0, :, 2] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "sdpa", "documents"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_never_read(backend, side, causal):
    """Laws 2 and 3: poison the padding; real outputs are bitwise the same, padding gives 0, gradients are finite."""
    tokens = Tokens.padded([5, 3], side=side)
    mask = lower(Causal() if causal else Full(), tokens, tokens)
    clean = draw()
    poisoned = [x.detach().clone() for x in clean]
    for x in poisoned:
        x[1, :, ~tokens.valid[1]] = float("nan")
        x.requires_grad_()
    want, got = (attend(*qkv, mask=mask, backend=backend) for qkv in (clean, poisoned))
    real = tokens.valid[:, None, :, None].expand_as(want)
    assert torch.equal(want[real], got[real])
    assert (got[1, :, ~tokens.valid[1]] == 0).all()
    got.square().sum().backward()
    for x in poisoned:
        assert x.grad.isfinite().all()
        assert (x.grad[1, :, ~tokens.valid[1]] == 0).all()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=4), min_size=1, max_size=3), pad=st.integers(0, 3),
    causal=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_documents_equal_a_dense_mask(rows, pad, causal, seed):
    """Law 16, forward and backward, against the formula with a dense mask."""
    length = max([sum(row) for row in rows] + [1]) + pad
    tokens = Tokens.packed(rows, length)
    mask = lower(Causal() if causal else Full(), tokens, tokens)
    grads = []
    for backend in ("documents", "reference", "sdpa"):
        qkv = draw(batch=len(rows), queries=length, seed=seed)
        out = attend(*qkv, mask=mask, backend=backend)
        out.pow(3).sum().backward()
        grads.append([out, *(x.grad for x in qkv)])
    for got in grads[::2]:
        for a, b in zip(got, grads[1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=FLOAT64)


def test_documents_passes_gradcheck_and_opcheck():
    tokens = Tokens.packed([[2, 3], [1, 2]], 5)
    mask = lower(Causal(), tokens, tokens)
    qkv = draw(width=4)
    assert torch.autograd.gradcheck(lambda *x: attend(*x, mask=mask, backend="documents"), qkv)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # tests/compiled compiles it
    arguments = [*qkv, mask.bounds], [1.0, 0.5]
    torch.library.opcheck(torch.ops.qkv.attend_documents.default, arguments, test_utils=checks)


def test_the_choice_of_kernel():
    """Plain causal is a flag, packed is per document unless short, and neither is the quadratic kernel (law 7)."""
    q, k, v = draw()
    full, packed = Tokens.full(2, 5), Tokens.packed([[2, 3], [5]])
    long = Tokens.packed([[30, SHORT + 1 - 30]])
    x = torch.randn(1, 2, SHORT + 1, 8)
    with kernels_used() as names:
        attend(q, k, v, mask=Causal())
        attend(q, k, v, mask=lower(Causal(), full, full))
        attend(q, k, v, mask=lower(Causal(), packed, packed))
        attend(q, k, v, mask=lower(Causal() & Window(size=2), packed, packed))
        attend(q, k, v, mask=lower(Causal(), packed, packed), dropout=0.5)
        attend(x, x, x, mask=lower(Causal(), long, long))
    assert names == ["sdpa:flash", "sdpa:flash", "sdpa:flash", "sdpa:flash", "sdpa:math", "documents"]
    assert lower(Causal(), full, full).form is Form.CAUSAL
    assert not lower(Causal(), long, long).at_hand  # no square was made


def test_a_backend_honours_or_raises():
    q, k, v = draw()
    packed = Tokens.packed([[2, 3], [5]])
    mask = lower(Causal(), packed, packed)
    with pytest.raises(ConfigError, match="'documents' has no dropout"):
        attend(q, k, v, mask=mask, dropout=0.1, backend="documents")
    with pytest.raises(ConfigError, match="'documents' needs documents"):
        attend(q, k, v, mask=Causal(), backend="documents")
    with pytest.raises(ConfigError, match="values as wide as keys"):
        attend(q, k, v[..., :3], mask=mask, backend="documents")
    with pytest.raises(ConfigError, match=r"\(2, 3, 5, 8\).*do not fit"):
        attend(q[:, :3], k, v, mask=Causal())


def test_weights_sum_to_one_and_dropout_keeps_the_mean():
    q, k, v = draw(queries=6)
    weights = attention_weights(q, k, mask=Causal(), scale=0.3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6, dtype=torch.float64), rtol=0, atol=FLOAT64)
    assert (weights.triu(1) == 0).all()
    torch.manual_seed(0)
    many = [x[:1].expand(3000, -1, -1, -1) for x in (q, k, v)]
    mean = attend(*many, mask=Full(), dropout=0.5, backend="reference").mean(0)
    # 3,000 draws of values of order 1: the mean is known to about 0.02; six times that.
    torch.testing.assert_close(mean, attend(q, k, v, mask=Full())[0], rtol=0, atol=0.12)


def test_the_oracle_bounds_the_error_of_float32():
    """A backend's error is at most twice that of the plain formula in the same type, forward and backward."""
    tokens = Tokens.packed([[40, 57], [97]])
    mask = lower(Causal(), tokens, tokens)

    def run(dtype, backend):
        qkv = [x.detach().to(dtype).requires_grad_() for x in draw(queries=97, width=16)]
        out = attend(*qkv, mask=mask, backend=backend)
        out.pow(2).sum().backward()
        return [out.double(), *(x.grad.double() for x in qkv)]

    exact, plain, fast = (
        run(torch.float64, "reference"),
        run(torch.float32, "reference"),
        run(torch.float32, "documents"),
    )
    for truth, a, b in zip(exact, plain, fast, strict=True):
        assert (b - truth).abs().max() <= 2 * (a - truth).abs().max()
