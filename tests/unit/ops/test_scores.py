"""Scores of the recurrent translators, by hand."""

import math

import torch

from qkv.ops import additive_scores, dot_scores, general_scores, normalised
from tolerances import FLOAT64


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_additive_scores_are_those_of_the_paper():
    queries, keys, v = draw(2, 3, 5), draw(2, 4, 5), draw(5)
    got = additive_scores(queries, keys, v)
    for b, t, s in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        want = sum(v[a] * math.tanh(queries[b, t, a] + keys[b, s, a]) for a in range(5))
        torch.testing.assert_close(got[b, t, s], want, rtol=0, atol=FLOAT64)


def test_multiplicative_scores():
    queries, keys, weight = draw(2, 3, 5), draw(2, 4, 6), draw(5, 6)
    want = torch.stack([torch.stack([q @ weight @ k.T for q in row]) for row, k in zip(queries, keys, strict=True)])
    torch.testing.assert_close(general_scores(queries, keys, weight), want, rtol=0, atol=FLOAT64)
    torch.testing.assert_close(
        dot_scores(queries, keys[..., :5]),
        general_scores(queries, keys, torch.eye(5, 6).double()),
        rtol=0,
        atol=FLOAT64,
    )


def test_weights_sum_to_one_and_padding_has_none():
    scores = draw(2, 3, 4).requires_grad_()
    valid = torch.tensor([[True, True, False, False], [False] * 4])
    weights = normalised(scores, valid)
    assert weights[0].sum(-1).sub(1).abs().max() < FLOAT64
    assert (weights[:, :, 2:] == 0).all()
    assert (weights[1] == 0).all()
    weights.square().sum().backward()
    assert scores.grad.isfinite().all()
    assert normalised(scores).sum(-1).sub(1).abs().max() < FLOAT64
