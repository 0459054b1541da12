# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""The block structure of a mask: which tiles of queries times keys are empty, full or mixed, without the square."""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch

from qkv.masks import Mask, Span, Tile
from qkv.shapes import Int, Integer, Tensor

TILE = 64
"""Queries and keys of a tile. What lies between the edge of a window and that of a tile is computed for nothing."""

EMPTY, MIXED, FULL = 0, 1, 2


class TiledMask(NamedTuple):
    """A mask as an operator takes it, which knows tensors and numbers only.

    Attributes:
        kinds: `EMPTY`, `MIXED` or `FULL` for each tile of `TILE` queries and keys, on the CPU.
        q: Index, order and segment of the queries, for the pairs of mixed tiles; one row if all are alike.
        k: The same for the keys.
        mask: `Mask.number`.
    """

    kinds: Integer[Tensor, "#B t s"]
    q: Int[Tensor, "3 #B T"]
    k: Int[Tensor, "3 #B S"]
    mask: int


class Run(NamedTuple):
    """Neighbouring keys, and whether every query of the block sees all of them."""

    keys: slice
    full: bool


class Work(NamedTuple):
    """A block of queries in some rows of the batch, and the keys that any of them may see."""

    rows: slice
    queries: slice
    runs: list[Run]


def tile_kinds(
    mask: Mask, q: Int[Tensor, "3 #B T"], k: Int[Tensor, "3 #B S"], n_queries: int = TILE, n_keys: int = TILE
) -> Integer[Tensor, "#B t s"]:
    """`EMPTY`, `MIXED` or `FULL` for each tile of `n_queries` times `n_keys`, on the CPU.

    Cautious as `Mask.tiles` is: a tile called mixed may turn out to be empty or full. Memory is that of the tiles.
    """
    (q_index, q_order, a), (k_index, k_order, b) = (
        [Span(low[..., :, None], high[..., :, None]) for low, high in zip(*_spans(q, n_queries), strict=True)],
        [Span(low[..., None, :], high[..., None, :]) for low, high in zip(*_spans(k, n_keys), strict=True)],
    )
    some, every = mask.tiles(Tile(q_index, q_order), Tile(k_index, k_order))
    some = some & (a.low <= b.high) & (b.low <= a.high) & (a.high > 0) & (b.high > 0)
    every = every & (a.low == a.high) & (b.low == b.high)  # and where they meet, they are one document
    return (some.byte() + (some & every).byte()).cpu()


def work(
    kinds: Integer[Tensor, "#B t s"], n_queries: int, n_keys: int, together: int, longest: int, size: int = TILE
) -> Iterator[Work]:
    """The tiles of `tile_kinds` that are not empty, as runs of neighbouring keys for each block of queries.

    A block has `together` tiles of `size` queries, a run at most `longest` keys, but a tile at least. Rows that are
    alike come together.
    """
    if together > 1:
        low, high = _spans(kinds.mT, together)
        kinds = torch.where(low == high, low, MIXED).mT
    block = size * together
    for row, of_row in enumerate(kinds.tolist()):
        rows = slice(None) if len(kinds) == 1 else slice(row, row + 1)
        for i, of_block in enumerate(of_row):
            runs = [
                Run(slice(start * size, min(end * size, n_keys)), kind == FULL)
                for start, end, kind in _runs(of_block, max(1, longest // size))
            ]
            if runs:
                yield Work(rows, slice(i * block, min((i + 1) * block, n_queries)), runs)


def _runs(kinds: list[int], most: int) -> Iterator[tuple[int, int, int]]:
    """(first, end, kind) of at most `most` neighbours of one kind."""
    start = 0
    for kind, group in groupby(kinds):
        end = start + len(list(group))
        if kind != EMPTY:
            yield from ((at, min(at + most, end), kind) for at in range(start, end, most))
        start = end


def _spans(x: Integer[Tensor, "*B N"], size: int) -> tuple[Tensor, Tensor]:
    """The lowest and the highest of every `size` neighbours, (*B, N / size rounded up)."""
    short = -x.shape[-1] % size
    if short:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], short)], dim=-1)
    low, high = x.unflatten(-1, (-1, size)).aminmax(dim=-1)
    return low, high
