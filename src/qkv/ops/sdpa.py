# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""PyTorch's scaled_dot_product_attention, and which of its kernels runs behind it."""

import torch
import torch.nn.functional as F

from qkv.ops.backend import Backend, Problem
from qkv.shapes import Tensor


def _refuses(p: Problem) -> str:
    if p.sinks is not None:
        return "has no sinks"
    return "" if p.softcap is None else f"has no soft-cap (asked for {p.softcap})"


def _mask(p: Problem) -> Tensor | None:
    """The mask and the bias as one tensor; None where the causal flag says it all."""
    if p.bias is None:
        return None if p.mask.plain else p.mask.dense
    bias, allowed = p.bias_tensor().to(p.q.dtype), p.mask.dense
    return bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)


def _run(p: Problem) -> Tensor:
    p = p.without_padding()
    mask = _mask(p)
    if p.q.shape[2] == 1 and p.q.shape[1] != p.k.shape[1]:
        return _one_query(p, mask)
    return F.scaled_dot_product_attention(
        p.q,
        p.k,
        p.v,
        attn_mask=mask,
        dropout_p=p.dropout,
        is_causal=mask is None and p.mask.causal,
        scale=p.scale,
        enable_gqa=p.q.shape[1] != p.k.shape[1],
    )


def _one_query(p: Problem, mask: Tensor | None) -> Tensor:
    """A single query a head, as in decoding: the heads that share a key stand as queries of one head.

    PyTorch would repeat keys and values for each of them, which costs more than the attention itself.
    """
    groups = (p.k.shape[1], -1)
    if mask is not None and mask.shape[1] > 1:
        mask = mask.squeeze(2).unflatten(1, groups)  # (B, G, H/G, S)
    q = p.q.squeeze(2).unflatten(1, groups)
    out = F.scaled_dot_product_attention(q, p.k, p.v, attn_mask=mask, dropout_p=p.dropout, scale=p.scale)
    return out.flatten(1, 2)[:, :, None]


def kernel(p: Problem) -> str:
    """What PyTorch runs: flash, efficient, cudnn, or math, which is quadratic in memory."""
    mask, gqa = _mask(p), p.q.shape[1] != p.k.shape[1]
    causal = mask is None and p.mask.causal
    choice = torch._fused_sdp_choice(p.q, p.k, p.v, mask, p.dropout, causal, enable_gqa=gqa)  # pyright: ignore
    return {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}.get(int(choice), str(choice))


def _memory(p: Problem) -> int:
    """The mask as it is given, and in the type of the queries, as PyTorch turns it into."""
    pairs = p.q.shape[2] * p.k.shape[2]
    if p.bias is not None:
        return p.q.shape[0] * p.q.shape[1] * pairs * p.q.dtype.itemsize
    return 0 if p.mask.plain else p.q.shape[0] * pairs * (1 + p.q.dtype.itemsize)


SDPA = Backend("sdpa", _refuses, _run, _memory)
