"""The loop of Bahdanau's decoder as one operation, held to the loop itself."""

import pytest
import torch
import torch.nn.functional as F

from qkv.ops.attentive_gru import AttentiveGRU, Looked, attentive_gru
from qkv.ops.scores import additive_scores, normalised
from tolerances import FLOAT64

NEEDED = [name for name in AttentiveGRU._fields if name != "valid"]


def draw(t=4, n=3, s=5, h=6, a=7, m=8, *, padded=True, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = {
        "inputs": (t, n, 3 * h), "start": (n, h), "keys": (n, s, a), "memory": (n, s, m), "query_weight": (a, h),
        "v": (a,), "to_gates": (m, 3 * h), "weight": (3 * h, h), "bias": (3 * h,),
    }  # fmt: skip
    drawn = {
        key: torch.randn(shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.25 for key, shape in shapes.items()
    }
    lengths = torch.tensor([s - 2 * (row % 2) for row in range(n)])
    valid = torch.arange(s) < lengths[:, None] if padded else None
    return AttentiveGRU(valid=valid, **{key: x.to(dtype).requires_grad_() for key, x in drawn.items()})


def attentive_gru_loop(p):
    """The formula, a step at a time."""
    states, contexts, looks = [p.start], [], []
    cut = 2 * p.start.shape[-1]
    for x in p.inputs.unbind(0):
        h = states[-1]
        look = normalised(additive_scores(F.linear(h, p.query_weight)[:, None], p.keys, p.v), p.valid)
        context = (look @ p.memory)[:, 0]
        gates, recurrent = x + context @ p.to_gates, F.linear(h, p.weight, p.bias)
        r, z = (gates[:, :cut] + recurrent[:, :cut]).sigmoid().chunk(2, dim=-1)
        n = torch.tanh(gates[:, cut:] + r * recurrent[:, cut:])
        states.append((1 - z) * n + z * h)
        contexts.append(context)
        looks.append(look[:, 0])
    return Looked(torch.stack(states), torch.stack(contexts), torch.stack(looks))


def needed(p):
    return [getattr(p, name) for name in NEEDED]


def gradients(function, p, wanted=Looked._fields, **options):
    """Of sums of what comes out, each number with a factor of its own."""
    out = function(p)
    chosen = [getattr(out, name) for name in wanted]
    factors = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in chosen]
    leaves = [x for x in needed(p) if x.requires_grad]
    return [*out, *torch.autograd.grad(chosen, leaves, factors, allow_unused=True, **options)]


def agree(p, tolerance, **options):
    for ours, theirs in zip(*(gradients(f, p, **options) for f in (attentive_gru, attentive_gru_loop)), strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("wanted", [Looked._fields, ("states",), ("contexts",), ("states", "contexts"), ("weights",)])
def test_it_is_the_loop(padded, wanted):
    agree(draw(padded=padded), FLOAT64, wanted=wanted)


def test_it_is_the_loop_in_float32():
    """Sums of 20 tokens and 40 places in another order: a few hundred roundings of 6e-8, of the largest number."""
    agree(draw(20, 8, 40, 32, 24, 48, dtype=torch.float32), 2e-5)


@pytest.mark.parametrize("sizes", [{"t": 1}, {"n": 1, "s": 3}, {"s": 3, "n": 1, "h": 1, "a": 1, "m": 1}])
def test_it_is_the_loop_at_the_edges(sizes):
    agree(draw(**sizes), FLOAT64)


def test_gradients_are_those_of_differences():
    p = draw(3, 2, 3, 1, 2, 2)

    def function(*numbers):
        return tuple(attentive_gru(AttentiveGRU(valid=p.valid, **dict(zip(NEEDED, numbers, strict=True)))))

    assert torch.autograd.gradcheck(function, needed(p), fast_mode=True)
    (grad,) = torch.autograd.grad(sum(x.sum() for x in function(*needed(p))), p.v, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):  # no second derivative, rather than a wrong one
        grad.sum().backward()


@pytest.mark.parametrize("name", NEEDED)
def test_one_gradient_alone(name):
    p = draw()
    frozen = p._replace(**{key: getattr(p, key).detach() for key in NEEDED if key != name})
    agree(frozen, FLOAT64)


def test_a_second_pass_gives_the_same_and_changes_nothing():
    p = draw()
    out = attentive_gru(p)
    factors = [torch.ones_like(x) for x in out]
    once = torch.autograd.grad(out, needed(p), factors, retain_graph=True)
    again = torch.autograd.grad(out, needed(p), factors)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all((x == 1).all() for x in factors)


def test_a_source_of_nothing_but_padding():
    p = draw()
    p.valid[1] = False
    out = attentive_gru(p)
    assert (out.weights[:, 1] == 0).all()
    assert (out.contexts[:, 1] == 0).all()
    agree(p, FLOAT64)


def test_the_tangents_of_the_scores_are_not_kept():
    """T·N·S·A numbers, which autograd keeps of the loop."""
    p, tangents, kept = draw(30, 2, 20, 4, 16, 4), 30 * 2 * 20 * 16, {}
    for function in (attentive_gru, attentive_gru_loop):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            function(p)
        kept[function] = sum(saved)
    assert kept[attentive_gru] < tangents < kept[attentive_gru_loop]
