# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Attention inside documents that lie side by side in a row: each document is a problem of its own, none is masked.

A custom op, so that a compiled model sees one node whose shapes do not depend on how many documents there are. The cost
is the sum of the squares of the documents' lengths; padding is neither read nor computed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from qkv.lowered import Form
from qkv.ops.backend import Backend, Problem
from qkv.ops.operator import Tensors, operator
from qkv.shapes import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Run(NamedTuple):
    """Neighbours in a row that are of one length, as far as the kernel is concerned one batch."""

    row: int
    start: int
    n: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        """(B, heads, T, width) or (B, heads, T) to (n, heads, length, …), of the same memory."""
        return x[self.row, :, self.start : self.start + self.n * self.length].unflatten(1, (self.n, -1)).transpose(0, 1)


def _runs(bounds: Tensor) -> Iterator[_Run]:
    """All documents."""
    n = int(bounds[:, 2].count_nonzero())
    last: _Run | None = None
    for row, start, stop in bounds[:n].tolist():
        length = stop - start
        if last and (last.row, last.start + last.n * last.length, last.length) == (row, start, length):
            last = last._replace(n=last.n + 1)
            continue
        if last:
            yield last
        last = _Run(row, start, 1, length)
    if last:
        yield last


def _like(x: Tensor) -> Tensor:
    """Zeros with the layout (B, T, heads, width) in memory, seen as (B, heads, T, width)."""
    return x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _outputs(tensors: Tensors) -> Tensors:
    """Zeros for the output (B, H, T, K), and for the log-sum-exp of the scores (B, H, T)."""
    q = tensors[0]
    return [_like(q), q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))]


def _gradients(tensors: Tensors) -> Tensors:
    return [_like(x) for x in tensors[:3]]


def _forward(tensors: Tensors, numbers: list[float]) -> Tensors:
    """Attention of every document to itself; 0 at padding."""
    q, k, v, bounds = tensors
    causal, scale = bool(numbers[0]), numbers[1]
    out, lse = results = _outputs(tensors)
    for run in _runs(bounds):
        o, part = _flash(run.of(q), run.of(k), run.of(v), 0.0, causal, scale=scale)
        run.of(out).copy_(o)
        run.of(lse).copy_(part)
    return results


def _backward(tensors: Tensors, numbers: list[float], results: Tensors, grads: Tensors) -> Tensors:
    *qkv, bounds = tensors
    causal, scale = bool(numbers[0]), numbers[1]
    found = _gradients(tensors)
    for run in _runs(bounds):
        grad, q, k, v, out, lse = (run.of(x) for x in (grads[0], *qkv, *results))
        pieces = _flash_backward(grad, q, k, v, out, lse.contiguous(), 0.0, causal, scale=scale)
        for whole, piece in zip(found, pieces, strict=True):
            run.of(whole).copy_(piece)
    return found


attend_documents = operator("attend_documents", _forward, _backward, outputs=_outputs, gradients=_gradients)
"""From q (B, H, T, K), k and v (B, G, T, K) and `document_bounds`; and from whether it is causal, and the scale."""


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
    return attend_documents([p.q, p.k, p.v, p.mask.bounds], [p.mask.causal, p.scale])[0]


DOCUMENTS = Backend("documents", _refuses, _run, lambda _: 0)  # pyright: ignore[reportUnknownLambdaType]
