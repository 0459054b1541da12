# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Attention inside documents that lie side by side in a row: each document is a problem of its own, none is masked.

A custom op, so that a compiled model sees one node whose shapes do not depend on how many documents there are. The cost
is the sum of the squares of the documents' lengths; padding is neither read nor computed.
"""

from collections.abc import Iterator
from typing import Any

import torch

from qkv.lowered import Form
from qkv.ops.backend import Backend, Problem
from qkv.shapes import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _documents(bounds: Tensor) -> Iterator[tuple[int, slice]]:
    """(row, place) of every document."""
    n = int(bounds[:, 2].count_nonzero())
    return ((row, slice(start, stop)) for row, start, stop in bounds[:n].tolist())


def _like(x: Tensor) -> Tensor:
    """Zeros with the layout (B, T, heads, width) in memory, seen as (B, heads, T, width)."""
    return x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _cut(x: Tensor, row: int, place: slice) -> Tensor:
    return x[row : row + 1, :, place]


@torch.library.custom_op("qkv::attend_documents", mutates_args=())
def attend_documents(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of every document to itself; q (B, H, T, K), k and v (B, G, T, K); `bounds` from `document_bounds`.

    Returns:
        The output (B, H, T, K), 0 at padding, and the log-sum-exp of the scores (B, H, T), for the backward pass.
    """
    out = _like(q)
    lse = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for row, place in _documents(bounds):
        o, part = _flash(_cut(q, row, place), _cut(k, row, place), _cut(v, row, place), 0.0, causal, scale=scale)
        _cut(out, row, place).copy_(o)
        lse[row : row + 1, :, place] = part
    return out, lse


@torch.library.custom_op("qkv::attend_documents_backward", mutates_args=())
def attend_documents_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; 0 at padding."""
    grads = _like(q), _like(k), _like(v)
    for row, place in _documents(bounds):
        g, a, b, c, o = (_cut(x, row, place) for x in (grad, q, k, v, out))
        part = lse[row : row + 1, :, place].contiguous()
        for whole, piece in zip(grads, _flash_backward(g, a, b, c, o, part, 0.0, causal, scale=scale), strict=True):
            _cut(whole, row, place).copy_(piece)
    return grads


@attend_documents.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@attend_documents_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, bounds, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, bounds)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    q, k, v, out, lse, bounds = ctx.saved_tensors
    return *attend_documents_backward(grad, q, k, v, out, lse, bounds, ctx.causal, ctx.scale), None, None, None


torch.library.register_autograd("qkv::attend_documents", _backward, setup_context=_setup)  # pyright: ignore


def _refuses(p: Problem) -> str:
    if p.mask.form is not Form.DOCUMENTS:
        return "needs documents side by side, under Full or Causal"
    if p.q.device.type != "cpu":
        return f"runs on the CPU only (the tensors are on {p.q.device.type})"
    if p.q.shape[-1] != p.v.shape[-1]:
        return f"needs values as wide as keys ({p.v.shape[-1]} and {p.q.shape[-1]})"
    options = {"dropout": p.dropout or None, "bias": p.bias, "sinks": p.sinks, "soft-cap": p.softcap}
    asked = [name for name, value in options.items() if value is not None]
    return f"has no {asked[0]}" if asked else ""


def _run(p: Problem) -> Tensor:
    out, _ = attend_documents(p.q, p.k, p.v, p.mask.bounds, p.mask.causal, p.scale)
    return out


def _memory(_: Problem) -> int:
    return 0


DOCUMENTS = Backend("documents", "documents under Full or Causal, on the CPU; skips padding", _refuses, _run, _memory)
