# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Attention tile by tile with an online softmax: memory grows with the tokens, and tiles that are masked cost nothing.

Source: Milakov and Gimelshein 2018 for the online softmax; Rabe and Staats 2021 and Dao et al. 2022 (FlashAttention),
algorithms 1 and 4, for attention with it. Differs in that a tile is a batched matrix product of PyTorch's, so that it
runs anywhere, and in that whole tiles are skipped by what the mask says of them (`tiles.py`).
"""

import math
from collections.abc import Iterator

import torch

from qkv.masks import Mask, allowed
from qkv.ops.backend import Backend, Problem, place_of_distance
from qkv.ops.operator import Tensors, operator
from qkv.shapes import Tensor
from qkv.tiles import TILE, Run, Work, work

_ROWS = 256
"""Query rows of a block: tokens times query heads per kv head. A block has at least the tokens of one tile."""

_LONGEST = 512
"""Keys of neighbouring tiles that are taken together. Scores of 8 heads, 256 x 512, take 4 MiB: about a cache."""

_LEAST = -80.0
"""Scores are cut off so far below the highest: processors take 30 times as long for exponentials that underflow."""

_FAR = 1e30
"""What is taken from scores that the mask forbids, so that none of them is the highest."""


def _outputs(tensors: Tensors) -> Tensors:
    q, v = tensors[0], tensors[2]
    return [_like(q, v.shape[-1]), q.new_empty((2, *q.shape[:3]), dtype=torch.promote_types(q.dtype, torch.float32))]


def _gradients(tensors: Tensors) -> Tensors:
    q, *others = tensors[:5]
    return [_like(q, q.shape[-1]), *(x.new_empty(x.shape) for x in others)]


def _forward(tensors: Tensors, numbers: list[float]) -> Tensors:
    """The output; and for the backward pass the highest score of each query, and the sum of the exponentials beyond it.

    (Their one log-sum-exp, which others keep, would round the weights.)
    """
    q, _, v, _, sinks, *_ = tensors
    tiles = _Tiles(tensors, numbers)
    out, sums = _outputs(tensors)
    out.zero_()
    sums[0], sums[1] = 0.0, math.inf  # of a query that sees nothing: its weights are 0 in the backward pass
    lowest = torch.finfo(sums.dtype).min
    for at in tiles.work():
        queries = tiles.queries(q, at)
        top = queries.new_full((*queries.shape[:2], 1), lowest, dtype=sums.dtype)
        total = torch.zeros_like(top)
        summed = queries.new_zeros(*queries.shape[:2], v.shape[-1], dtype=sums.dtype)
        if sinks.numel():
            top, total = tiles.sinks(sinks, at).to(sums.dtype), torch.ones_like(top)
        for run in at.runs:
            scores, keep, _ = tiles.scores(queries, at, run)
            if keep is not None:
                tiles.heads(scores).add_((keep - 1) * _FAR)
            new = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights = tiles.weights(scores.sub_(new), keep)
            shrink = (top - new).clamp_(min=_LEAST).exp_()
            total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
            _add_product(summed.mul_(shrink), weights, tiles.part(tiles.v, at, run))
            top = new
        total.masked_fill_(total == 0, math.inf)
        tiles.put(out, at, summed / total)
        tiles.put(sums[0], at, top.squeeze(-1))
        tiles.put(sums[1], at, total.squeeze(-1))
    return [out, sums]


def _backward(tensors: Tensors, numbers: list[float], results: Tensors, grads: Tensors) -> Tensors:
    q, k, v, bias, sinks, *_ = tensors
    (out, sums), grad, wide = results, grads[0], results[1].dtype
    tiles = _Tiles(tensors, numbers)
    grad_q = _like(q, q.shape[-1]).zero_()
    grad_k, grad_v = torch.zeros_like(tiles.k, dtype=wide), torch.zeros_like(tiles.v, dtype=wide)
    grad_bias = torch.zeros_like(bias, dtype=torch.float64)  # most pairs may be in one of the two ends
    delta = torch.linalg.vecdot(grad.to(wide), out.to(wide)) / sums[1]  # (B, H, T)
    grad_sinks = -((sinks[:, None] - sums[0]).exp() * delta).sum((0, 2)) if sinks.numel() else sinks.new_empty(0)
    for at in tiles.work():
        top, total, shift = (tiles.queries(x[..., None], at) for x in (*sums, delta))
        queries, above = tiles.queries(q, at), (tiles.queries(grad, at) / total).to(q.dtype)
        found = torch.zeros_like(queries, dtype=wide)
        for run in at.runs:
            scores, keep, slope = tiles.scores(queries, at, run)
            # Times the total, by which `above` and `shift` are divided.
            weights = tiles.weights(scores.sub_(top), keep)
            _add_product(tiles.part(grad_v, at, run), weights.mT, above)
            into = tiles.product(above, tiles.part(tiles.v, at, run).mT, 1.0, 1).sub_(shift).mul_(weights)
            tiles.add_to_bias(grad_bias, at, run, into)
            if slope is not None:
                into.mul_(slope)
            _add_product(found, into, tiles.part(tiles.k, at, run), tiles.scale)
            _add_product(tiles.part(grad_k, at, run), into.mT, queries, tiles.scale)
        tiles.put(grad_q, at, found)
    found = grad_k.view(k.shape), grad_v.view(v.shape), grad_bias, grad_sinks
    return [grad_q, *(g.to(x.dtype) for g, x in zip(found, (k, v, bias, sinks), strict=True))]


attend_tiled = operator("attend_tiled", _forward, _backward, outputs=_outputs, gradients=_gradients)
"""Attention under a `TiledMask`; with B, H, T and S as in `attend`.

From q, k, v; the bias and the sinks of a `Problem`, empty where there are none; and the tensors of the mask. From the
number of the mask, the scale, and the soft-cap, 0 for none.
"""


class _Tiles:
    """Views of the tiles of one problem, as three axes: (rows times kv heads, query rows or keys, width)."""

    def __init__(self, tensors: Tensors, numbers: list[float]) -> None:
        q, k, v, self.bias, _, self.kinds, self.q_places, self.k_places = tensors
        number, self.scale, self.softcap = numbers
        self.mask = Mask.numbered(int(number))
        self.batch, self.groups = k.shape[:2]
        self.per_key = q.shape[1] // self.groups
        self.k, self.v = k.contiguous().flatten(0, 1), v.contiguous().flatten(0, 1)  # (B·G, S, width)
        self.together = _together(self.per_key)
        self.wide = torch.promote_types(q.dtype, torch.float32)
        # Two buffers for all tiles: fresh memory of this size costs a page fault for every 4 KiB.
        size = self.batch * q.shape[1] * self.together * TILE * min(_LONGEST, max(k.shape[2], 1))
        self.buffers = q.new_empty(2, size)

    def work(self) -> Iterator[Work]:
        """What is to be computed."""
        return work(self.kinds, self.q_places.shape[-1], self.k_places.shape[-1], self.together, _LONGEST)

    def queries(self, x: Tensor, at: Work) -> Tensor:
        """(B, H, T, n) to (b·G, H/G·t, n): the query heads of a kv head one after the other."""
        return x[at.rows, :, at.queries].unflatten(1, (self.groups, self.per_key)).flatten(2, 3).flatten(0, 1)

    def put(self, x: Tensor, at: Work, tile: Tensor) -> None:
        """Write a tile of queries back into (B, H, T, …)."""
        part = x[at.rows, :, at.queries]
        part.copy_(tile.view(-1, self.groups, self.per_key, part.shape[2], *tile.shape[2:]).flatten(1, 2))

    def part(self, x: Tensor, at: Work, run: Run) -> Tensor:
        """The keys of a run, of (B·G, S, width)."""
        first = (at.rows.start or 0) * self.groups
        rows = slice(None) if at.rows.stop is None else slice(first, at.rows.stop * self.groups)
        return x[rows, run.keys]

    def sinks(self, sinks: Tensor, at: Work) -> Tensor:
        """(H,) to (b·G, H/G·t, 1)."""
        n = at.queries.stop - at.queries.start
        rows = self.batch if at.rows.stop is None else 1
        return sinks.view(1, self.groups, self.per_key, 1).expand(rows, -1, -1, n).reshape(rows * self.groups, -1, 1)

    def product(self, a: Tensor, b: Tensor, scale: float, buffer: int) -> Tensor:
        """`scale · a b` in at least float32, in one of the two buffers where the types allow it."""
        shape = (a.shape[0], a.shape[1], b.shape[2])
        out = self.buffers[buffer][: math.prod(shape)].view(shape)
        return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out).to(self.wide)

    def scores(self, queries: Tensor, at: Work, run: Run) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scores (b·G, H/G·t, s), what the mask keeps of them, and with a soft-cap the derivative by what was capped.

        What is kept: 1 where the mask allows and 0 elsewhere, as `heads` sees it; None where all is allowed.
        """
        scores = self.product(queries, self.part(self.k, at, run).mT, self.scale, 0)
        slope = None
        if self.softcap:
            scores = scores.div_(self.softcap).tanh_()
            slope = 1 - scores.square()
            scores = scores.mul_(self.softcap)
        if self.bias.numel():
            added = self.bias[:, self.distance(at, run)]  # (H, b or 1, t, s)
            self.heads(scores).add_(added.unflatten(0, (self.groups, self.per_key)).movedim(2, 0))
        if run.full:
            return scores, None, slope
        return scores, allowed(self.mask, *self.places(at, run)).to(self.wide)[:, None, None], slope

    def heads(self, scores: Tensor) -> Tensor:
        """(b·G, H/G·t, s) seen as (b, G, H/G, t, s)."""
        return scores.unflatten(0, (-1, self.groups)).unflatten(2, (self.per_key, -1))

    def weights(self, scores: Tensor, keep: Tensor | None) -> Tensor:
        """The exponentials of scores below 0, in place, and 0 where the mask forbids."""
        weights = scores.clamp_(_LEAST, 0.0).exp_()
        if keep is not None:
            self.heads(weights).mul_(keep)
        return weights

    def places(self, at: Work, run: Run) -> tuple[Tensor, Tensor]:
        """Index, order and segment of the queries and keys of a tile."""
        q, k = (x if x.shape[1] == 1 else x[:, at.rows] for x in (self.q_places, self.k_places))
        return q[..., at.queries], k[..., run.keys]

    def distance(self, at: Work, run: Run) -> Tensor:
        """The column of the bias for each pair of a tile, (b or 1, t, s)."""
        q, k = self.places(at, run)
        return place_of_distance(q[0], k[0], self.bias.shape[1])

    def add_to_bias(self, grad: Tensor, at: Work, run: Run, tile: Tensor) -> None:
        """Sum the gradients of a tile's scores by distance."""
        if not grad.numel():
            return
        place = self.distance(at, run)
        heads = self.heads(tile).flatten(1, 2)  # (b, H, t, s)
        heads = heads.sum(0, keepdim=True) if place.shape[0] == 1 else heads
        grad.index_add_(1, place.flatten(), heads.transpose(0, 1).flatten(1).to(grad.dtype))


def _together(per_key: int) -> int:
    """Tiles of queries in a block, with so many query heads per kv head."""
    return max(1, _ROWS // (TILE * per_key))


def _add_product(into: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """`into += scale · a b`; the product in the type of b, the sum in that of `into`."""
    if into.dtype == b.dtype:
        into.baddbmm_(a, b, alpha=scale)
    else:
        into.add_(torch.bmm(a.to(b.dtype), b), alpha=scale)


def _like(x: Tensor, width: int) -> Tensor:
    """Memory in the order (B, T, heads, width), seen as (B, heads, T, width)."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], width).transpose(1, 2)


def _refuses(p: Problem) -> str:
    return f"has no dropout (asked for {p.dropout})" if p.dropout else ""


def _run(p: Problem) -> Tensor:
    p = p.without_padding()
    *places, number = p.mask.tiles
    options = (p.q.new_empty(0) if x is None else x for x in (p.bias, p.sinks))
    return attend_tiled([p.q, p.k, p.v, *options, *places], [number, p.scale, p.softcap or 0.0])[0]


def _memory(p: Problem) -> int:
    """The scores of a tile."""
    block = _together(p.q.shape[1] // p.k.shape[1]) * TILE
    return p.q.shape[0] * p.q.shape[1] * block * _LONGEST * p.q.dtype.itemsize


TILED = Backend("tiled", _refuses, _run, _memory)
