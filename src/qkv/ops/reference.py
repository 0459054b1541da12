"""Attention as it is written: the readable definition that every other backend is held to."""

import torch
import torch.nn.functional as F

from qkv.ops.backend import Backend, Problem
from qkv.shapes import Float, Tensor


def weights_of(p: Problem) -> Float[Tensor, "B H T S"]:
    """softmax(scale · q kᵀ) over the keys that the mask allows; a query that sees nothing has weights 0.

    Source: Vaswani et al. 2017, section 3.2.1, equation 1, whose scale is 1/√K. With fewer kv heads than query heads,
    query head h reads kv head h // (H / G) (Ainslie et al. 2023). The soft-cap is that of Gemma 2 (2024, section 2);
    with sinks the weights of a query sum to less than 1 (Xiao et al. 2023; as logits in gpt-oss, 2025). The softmax
    runs in at least float32.
    """
    k = p.k.repeat_interleave(p.q.shape[1] // p.k.shape[1], dim=1)
    scores = torch.einsum("bhtk,bhsk->bhts", p.q, k).to(torch.promote_types(p.q.dtype, torch.float32)) * p.scale
    if p.softcap is not None:
        scores = p.softcap * torch.tanh(scores / p.softcap)
    if p.bias is not None:
        scores = scores + p.bias_tensor()
    allowed = p.mask.dense
    if allowed is not None:
        # The lowest finite number, not -inf: a row of -inf has a NaN gradient.
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if p.sinks is not None:
        sinks = p.sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return weights if allowed is None else weights * allowed


def _run(p: Problem) -> Tensor:
    """The weighted mean of the values; dropout falls on the weights."""
    p = p.without_padding()
    weights = F.dropout(weights_of(p), p.dropout, training=p.dropout > 0).to(p.v.dtype)
    return torch.einsum("bhts,bhsv->bhtv", weights, p.v.repeat_interleave(p.q.shape[1] // p.v.shape[1], dim=1))


def _memory(p: Problem) -> int:
    """Scores, weights, and weights in the type of the values."""
    wide = torch.promote_types(p.q.dtype, torch.float32)
    return p.q.shape[0] * p.q.shape[1] * p.q.shape[2] * p.k.shape[2] * (2 * wide.itemsize + p.v.dtype.itemsize)


REFERENCE = Backend("reference", lambda _: "", _run, _memory)  # pyright: ignore[reportUnknownLambdaType]
