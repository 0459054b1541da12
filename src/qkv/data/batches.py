"""Batches of packed documents, each a pure function of (seed, epoch, index)."""

import bisect
from dataclasses import dataclass
from typing import final

import numpy as np
import torch

from qkv.data.dataset import Split
from qkv.errors import ConfigError
from qkv.ops.loss import IGNORE
from qkv.shapes import Float, Int, Tensor

__all__ = ["IGNORE", "Batch", "Batches"]


@final
@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of `context` steps, in each of them pieces of documents side by side, then padding.

    Attributes:
        inputs: Token ids or vectors; 0 in the padding.
        targets: What follows each input in its document; -100 where that does not count. In the padding -100, for
            vectors 0.
        lengths: For each row the lengths of its pieces in order. No two pieces of a row may see each other.
    """

    inputs: Int[Tensor, "B T"] | Float[Tensor, "B T F"]
    targets: Int[Tensor, "B T"] | Float[Tensor, "B T F"]
    lengths: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class _Plan:
    """Pieces sorted by row: where each begins in the split, its length, and where each row begins among the pieces."""

    begins: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray

    @property
    def n_rows(self) -> int:
        return len(self.rows) - 1


@final
class Batches:
    """The batches of a split.

    A document is cut into pieces of at most `context` inputs, so that in an epoch each of its tokens but the first is a
    target exactly once. Short pieces share a row.

    With `shuffle` (training) every epoch has the rows in another order, and cuts each document that is longer than
    `context` from another random offset. All batches are full and all epochs equally long: the few rows beyond the last
    full batch are left out. Where a whole epoch does not fill one batch, it is one smaller batch.

    Without it (validation) all epochs are the same, nothing is left out, and the last batch may be smaller.

    Args:
        split: The documents.
        context: Inputs in a row (tokens).
        batch_size: Rows in a batch.
        seed: Chooses the order and the cuts; at least 0.
        shuffle: True for training, False for validation.

    Raises:
        ConfigError: A size below 1, a negative seed, or no document that has anything to predict.
    """

    def __init__(self, split: Split, *, context: int, batch_size: int, seed: int, shuffle: bool) -> None:
        for name, value, least in (("context", context, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ConfigError(f"{name}={value} must be at least {least}")
        self._split, self._context, self._batch_size, self._seed, self._shuffle = (
            split,
            context,
            batch_size,
            seed,
            shuffle,
        )
        lengths = np.diff(split.offsets) - 1
        self._begins, self._lengths = split.offsets[:-1][lengths > 0], lengths[lengths > 0]
        if not len(self._lengths):
            raise ConfigError(f"the split of {split.n_documents} documents has nothing to predict; use a longer one")
        # The plan of validation; in training it fixes the number of batches, which must not change between epochs.
        self._plain = _plan(self._begins, self._lengths, np.zeros_like(self._lengths), context, None, 1)
        self._latest = (-1, self._plain)

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(self._plain.n_rows, self._batch_size)
        return max(full, 1) if self._shuffle else full + (rest > 0)

    @property
    def longest(self) -> int:
        """Inputs of the longest document."""
        return int(self._lengths.max())

    @property
    def n_cut(self) -> int:
        """How many documents are longer than a row, and so cut into pieces that do not see one another."""
        return int((self._lengths > self._context).sum())

    def batch(self, epoch: int, index: int) -> Batch:
        """One batch; the same for the same seed, epoch and index, whatever was asked for before.

        Raises:
            IndexError: `index` is not in 0 <= index < len(self), or `epoch` is negative.
        """
        if not 0 <= index < len(self) or epoch < 0:
            raise IndexError(f"batch {index} of epoch {epoch}: there are {len(self)} batches in an epoch")
        plan = self._plan_of(epoch)
        first = index * self._batch_size
        return self._fill(plan, range(first, min(first + self._batch_size, plan.n_rows)))

    def _plan_of(self, epoch: int) -> _Plan:
        if not self._shuffle:
            return self._plain
        if self._latest[0] != epoch:
            random = np.random.default_rng([self._seed, epoch])
            long = self._lengths > self._context
            offsets = random.integers(0, self._context, len(long)) * long
            plan = _plan(self._begins, self._lengths, offsets, self._context, random, self._plain.n_rows)
            self._latest = (epoch, plan)
        return self._latest[1]

    def _fill(self, plan: _Plan, rows: range) -> Batch:
        values, counted = self._split.values, self._split.counted
        dtype = np.float32 if values.ndim == 2 else np.int64
        inputs = np.zeros((len(rows), self._context, *values.shape[1:]), dtype)
        targets = np.full_like(inputs, 0 if values.ndim == 2 else IGNORE)
        lengths: list[tuple[int, ...]] = []
        for i, row in enumerate(rows):
            pieces = slice(plan.rows[row], plan.rows[row + 1])
            lengths.append(tuple(plan.lengths[pieces].tolist()))
            place = 0
            for begin, length in zip(plan.begins[pieces].tolist(), lengths[-1], strict=True):
                inputs[i, place : place + length] = values[begin : begin + length]
                following = slice(begin + 1, begin + 1 + length)
                targets[i, place : place + length] = values[following]
                if counted is not None:
                    targets[i, place : place + length][~counted[following]] = IGNORE
                place += length
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), tuple(lengths))


def _plan(
    begins: np.ndarray,
    lengths: np.ndarray,
    offsets: np.ndarray,
    context: int,
    random: np.random.Generator | None,
    least_rows: int,
) -> _Plan:
    """Cut documents (`lengths` counts targets) and pack the pieces.

    Every document is cut `offsets` targets after its beginning, and every `context` from there. Without `random` the
    longer pieces come first, those of one length in the order of the documents.
    """
    begins, lengths = _cut(begins, lengths, offsets, context)
    order = np.arange(len(lengths)) if random is None else random.permutation(len(lengths))
    row_of_piece = np.empty(len(lengths), dtype=np.int64)
    row_of_piece[order] = _spread(_pack(lengths[order], context), least_rows)
    n_rows = int(row_of_piece.max()) + 1
    if random is not None:
        row_of_piece = random.permutation(n_rows)[row_of_piece]
    by_row = np.argsort(row_of_piece, kind="stable")
    rows = np.searchsorted(row_of_piece[by_row], np.arange(n_rows + 1))
    return _Plan(begins[by_row], lengths[by_row], rows)


def _cut(begins: np.ndarray, lengths: np.ndarray, offsets: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Begins and lengths of all pieces."""
    # Lay cells of `context` over a document, the first beginning `shift` before it: a piece is what it fills of a cell.
    shift = -offsets % context
    cells = -(-(lengths + shift) // context)
    document = np.repeat(np.arange(len(cells)), cells)
    cell = np.arange(len(document)) - np.repeat(np.cumsum(cells) - cells, cells)
    begin = np.maximum(cell * context - shift[document], 0)
    end = np.minimum((cell + 1) * context - shift[document], lengths[document])
    return begins[document] + begin, end - begin


def _pack(lengths: np.ndarray, context: int) -> np.ndarray:
    """The row of each piece: first-fit decreasing, for all rows of the same composition at once.

    A row takes the longest piece there is, then the longest that still fits, and so on. See histogram packing in
    Krell et al. 2021 (2107.02027), section 3.
    """
    by_length = np.argsort(lengths, kind="stable")
    counts = np.bincount(lengths, minlength=context + 1)
    next_of = np.cumsum(counts) - counts
    present: list[int] = np.flatnonzero(counts).tolist()
    rows = np.empty(len(lengths), dtype=np.int64)
    row = 0
    while present:
        composition = _composition(present, counts, context)
        times = min(int(counts[length]) // k for length, k in composition)
        for length, k in composition:
            taken = by_length[next_of[length] : next_of[length] + times * k]
            rows[taken] = row + np.repeat(np.arange(times), k)
            next_of[length] += times * k
            counts[length] -= times * k
        present = [length for length in present if counts[length]]
        row += times
    return rows


def _composition(present: list[int], counts: np.ndarray, context: int) -> list[tuple[int, int]]:
    """Lengths, and how many pieces of each, that the next row takes."""
    composition: list[tuple[int, int]] = []
    space, place = context, len(present)
    while place := bisect.bisect_right(present, space, hi=place):
        place -= 1
        length = present[place]
        k = min(space // length, int(counts[length]))
        composition.append((length, k))
        space -= k * length
    return composition


def _spread(rows: np.ndarray, least_rows: int) -> np.ndarray:
    """Move pieces out of shared rows into new ones until there are at least `least_rows`."""
    missing = least_rows - (int(rows.max()) + 1)
    if missing <= 0:
        return rows
    _, first_of_row = np.unique(rows, return_index=True)
    shared = np.setdiff1d(np.arange(len(rows)), first_of_row)
    rows[shared[:missing]] = rows.max() + 1 + np.arange(missing)
    return rows
