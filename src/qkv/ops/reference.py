"""Attention as it is written: the readable definition that every other backend is held to."""

import torch
import torch.nn.functional as F

from qkv.masks import LoweredMask
from qkv.shapes import Float, Tensor


def attention_weights(
    q: Float[Tensor, "B H T K"], k: Float[Tensor, "B G S K"], mask: LoweredMask, scale: float
) -> Float[Tensor, "B H T S"]:
    """softmax(scale · q kᵀ) over the keys that `mask` allows; a query that sees nothing has weights 0.

    Source: Vaswani et al. 2017, section 3.2.1, equation 1, whose scale is 1/√K. With fewer kv heads than query heads,
    query head h reads kv head h // (H / G) (Ainslie et al. 2023). The softmax runs in at least float32.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("bhtk,bhsk->bhts", q, k).to(torch.promote_types(q.dtype, torch.float32)) * scale
    allowed = mask.dense(q.shape[2], k.shape[2], q.device)
    if allowed is None:
        return scores.softmax(-1)
    # The lowest finite number, not -inf: a row of -inf has a NaN gradient.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~allowed, lowest).softmax(-1) * allowed


def reference_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S v"],
    mask: LoweredMask,
    scale: float,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T v"]:
    """The weighted mean of the values, with `attention_weights`; dropout (a probability) falls on the weights.

    Quadratic in memory. Padded keys and values are never read, so what they hold does not matter.
    """
    padding = mask.padding()
    if padding is not None:
        k, v = without_padding(k, padding), without_padding(v, padding)
        if mask.documents is not None:
            q = without_padding(q, padding)
    weights = F.dropout(attention_weights(q, k, mask, scale), dropout, training=dropout > 0).to(v.dtype)
    return torch.einsum("bhts,bhsv->bhtv", weights, v.repeat_interleave(q.shape[1] // v.shape[1], dim=1))


def without_padding(x: Tensor, valid: Tensor) -> Tensor:
    """`x` (B, heads, T, width) with zeros where `valid` (B, T) is False, even if there was a NaN."""
    return torch.where(valid[:, None, :, None], x, 0.0)
