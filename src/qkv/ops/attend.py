"""One signature for attention, and the choice of what runs behind it."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F

from qkv.errors import ConfigError
from qkv.masks import LoweredMask, Mask, lower
from qkv.ops.documents import attend_documents
from qkv.ops.reference import reference_attention, without_padding
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens

Backend = Literal["auto", "reference", "sdpa", "documents"]

_log: list[str] | None = None


@contextmanager
def kernels_used() -> Generator[list[str]]:
    """Collects which kernel each call of `attend` ran, while a `with` statement lasts.

    For SDPA the name says what PyTorch chose behind it: `sdpa:flash`, `sdpa:efficient` or `sdpa:math` (quadratic).
    """
    global _log
    outer, _log = _log, []
    try:
        yield _log
    finally:
        _log = outer


def attend(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S v"],
    *,
    mask: Mask | LoweredMask,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Float[Tensor, "B H T v"]:
    """Scaled dot-product attention: softmax(scale · q kᵀ) v over what `mask` allows.

    Args:
        q: Queries.
        k: Keys; G divides H, and query head h reads kv head h // (H / G).
        v: Values.
        mask: Who may attend to whom. A `Mask` is taken over one full sequence per row, the queries being its last T
            tokens; a `LoweredMask` has seen the tokens already.
        scale: 1/√K when None.
        dropout: Probability that a weight is dropped.
        backend: "auto" takes the fastest that honours the mask and the dropout. `documents` and `sdpa` need a mask of
            their kind, or raise.

    Raises:
        ConfigError: The shapes do not fit, or the backend cannot honour what is asked.

    Source: Vaswani et al. 2017, section 3.2.1. Differs in that a query that may see nothing returns 0.
    """
    if q.shape[1] % k.shape[1] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        raise ConfigError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together; they must be "
            "(B, H, T, K), (B, G, S, K) and (B, G, S, any), with H a multiple of G"
        )
    if isinstance(mask, Mask):
        mask = _lower_full(mask, q, k)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    name = _choose(q, v, mask, dropout) if backend == "auto" else backend
    if name == "reference":
        out = reference_attention(q, k, v, mask, scale, dropout)
    elif name == "documents":
        if (why := _cannot_split(q, v, mask, dropout)) or mask.documents is None:
            raise ConfigError(f"backend 'documents' {why or 'needs documents'}; use backend='sdpa' or 'auto'")
        out, _ = attend_documents(q, k, v, mask.documents, mask.causal, scale)
    else:
        out = _sdpa(q, k, v, mask, scale, dropout)
    if _log is not None:
        _log.append(name if name != "sdpa" else f"sdpa:{_sdpa_kernel(q, k, v, mask, dropout)}")
    return out


def _lower_full(mask: Mask, q: Tensor, k: Tensor) -> LoweredMask:
    keys = Tokens.full(k.shape[0], k.shape[2], device=k.device)
    if q.shape[2] == k.shape[2]:
        return lower(mask, keys, keys)
    queries = Tokens.full(q.shape[0], q.shape[2], start=k.shape[2] - q.shape[2], device=q.device)
    return lower(mask, queries, keys, past=True)


def _choose(q: Tensor, v: Tensor, mask: LoweredMask, dropout: float) -> Backend:
    if mask.documents is not None and not _cannot_split(q, v, mask, dropout):
        return "documents"
    return "sdpa"


def _cannot_split(q: Tensor, v: Tensor, mask: LoweredMask, dropout: float) -> str:
    """Why the kernel for documents cannot run; empty if it can."""
    if dropout:
        return f"has no dropout (asked for {dropout})"
    if q.device.type != "cpu":
        return f"runs on the CPU only (the tensors are on {q.device.type})"
    if q.shape[-1] != v.shape[-1]:
        return f"needs values as wide as keys ({v.shape[-1]} and {q.shape[-1]})"
    return ""


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, scale: float, dropout: float) -> Tensor:
    plain = mask.documents is None and mask.allow is None
    padding = mask.padding()
    if padding is not None:  # SDPA lets a NaN in a masked value through
        k, v = without_padding(k, padding), without_padding(v, padding)
        if mask.documents is not None:
            q = without_padding(q, padding)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if plain else mask.dense(q.shape[2], k.shape[2], q.device),
        dropout_p=dropout,
        is_causal=plain and mask.causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _sdpa_kernel(q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask, dropout: float) -> str:
    plain = mask.documents is None and mask.allow is None
    dense = None if plain else mask.dense(q.shape[2], k.shape[2], q.device)
    gqa = q.shape[1] != k.shape[1]
    choice = torch._fused_sdp_choice(q, k, v, dense, dropout, plain and mask.causal, enable_gqa=gqa)  # pyright: ignore
    return {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}.get(int(choice), str(choice))
