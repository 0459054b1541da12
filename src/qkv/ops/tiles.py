# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The block structure of a mask: which tiles of queries times keys are empty, full or mixed, without the square."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from qkv.masks import Rule, Span, Tile
from qkv.shapes import Bool, Int, Tensor


class Run(NamedTuple):
    """Keys that stand side by side, and whether every query of the block sees all of them."""

    keys: slice
    full: bool


class Work(NamedTuple):
    """A block of queries of some rows of the batch, and the keys that any of them may see."""

    rows: slice
    queries: slice
    runs: list[Run]


def tiles(rule: Rule, n_queries: int, n_keys: int) -> tuple[Bool[Tensor, "#B t s"], Bool[Tensor, "#B t s"]]:
    """Which tiles of `n_queries` times `n_keys` may hold a pair that is allowed, and which hold nothing else.

    Memory is that of the tiles. Both answers are cautious: see `Mask.tiles`.
    """
    q, k = _spans(rule.q, n_queries), _spans(rule.k, n_keys)
    (q_index, q_order, a), (k_index, k_order, b) = (
        [Span(low[..., :, None], high[..., :, None]) for low, high in zip(*q, strict=True)],
        [Span(low[..., None, :], high[..., None, :]) for low, high in zip(*k, strict=True)],
    )
    some, every = rule.mask.tiles(Tile(q_index, q_order), Tile(k_index, k_order))
    meet = (a.low <= b.high) & (b.low <= a.high) & (a.high > 0) & (b.high > 0)
    same = (a.low == a.high) & (b.low == b.high) & (a.low == b.low) & (b.low > 0)
    return some & meet, every & same


def work(rule: Rule, n_queries: int, n_keys: int, longest: int) -> Iterator[Work]:
    """The tiles that are not empty, as runs of at most `longest` keys for each block of queries.

    Rows that are alike come together. Blocks that see nothing are left out.
    """
    some, every = (x.tolist() for x in tiles(rule, n_queries, n_keys))
    n_rows, length, width = len(some), rule.q.shape[-1], rule.k.shape[-1]
    for row in range(n_rows):
        rows = slice(None) if n_rows == 1 else slice(row, row + 1)
        for i, (seen, full) in enumerate(zip(some[row], every[row], strict=True)):
            runs = [
                Run(slice(start * n_keys, min(end * n_keys, width)), kind)
                for start, end, kind in _runs(seen, full, max(1, longest // n_keys))
            ]
            if runs:
                yield Work(rows, slice(i * n_queries, min((i + 1) * n_queries, length)), runs)


def _runs(seen: list[bool], full: list[bool], most: int) -> Iterator[tuple[int, int, bool]]:
    """(first, end, full) of neighbouring tiles of one kind, at most `most` together."""
    start = 0
    for end in range(1, len(seen) + 1):
        goes_on = end < len(seen) and end - start < most and (seen[end], full[end]) == (seen[start], full[start])
        if not goes_on:
            if seen[start]:
                yield start, end, full[start]
            start = end


def _spans(place: Int[Tensor, "3 #B N"], size: int) -> tuple[Tensor, Tensor]:
    """The lowest and the highest of each number in each tile, (3, B, tiles)."""
    n = place.shape[-1]
    short = -n % size
    if short:
        place = torch.cat([place, place[..., -1:].expand(*place.shape[:-1], short)], dim=-1)
    low, high = place.unflatten(-1, (-1, size)).aminmax(dim=-1)
    return low, high
