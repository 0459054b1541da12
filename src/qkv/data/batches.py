"""Batches, each a pure function of (seed, epoch, index); those of packed documents."""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch

from qkv.data.dataset import Split
from qkv.errors import ConfigError
from qkv.models.pairs import Pair
from qkv.models.two_towers import Captioned
from qkv.ops.loss import IGNORE
from qkv.shapes import Tensor
from qkv.tokens import Tokens

__all__ = ["IGNORE", "Batch", "Batches", "PackedBatches", "tokens_of"]


@final
@dataclass(frozen=True, eq=False)
class Batch:
    """What a model's loss is computed from: `model.loss(batch.inputs, batch.targets, batch.tokens)`.

    Attributes:
        inputs: What the model reads: token ids (B, T), vectors (B, T, F), a `Pair` of source and target, or `Captioned`
            pictures.
        targets: The right output for each token; a token id of -100 counts nothing.
        tokens: Where the tokens that have targets stand.
    """

    inputs: Tensor | Pair | Captioned
    targets: Tensor
    tokens: Tokens

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(self.inputs.to(device), self.targets.to(device), self.tokens.to(device))


def tokens_of(lengths: Sequence[Sequence[int]], width: int) -> Tokens:
    """`Tokens.packed`, or `Tokens.full` where each row is one document without padding: that has faster kernels."""
    if all(tuple(row) == (width,) for row in lengths):
        return Tokens.full(len(lengths), width)
    return Tokens.packed(lengths, width)


class Batches(ABC):
    """The batches of a split, the same in every process for the same seed. What it is given are its attributes.

    Args:
        context: Tokens of a row at most.
        batch_size: Rows in a batch.
        seed: Chooses the order; at least 0.
        shuffle: True for training: every epoch has another order, and all of its batches are full, so that a few rows
            are left out; where there are too few rows for one batch, it is one smaller batch. False for what is held
            out: all epochs are the same, nothing is left out, and the last batch may be smaller.

    Raises:
        ConfigError: A size below 1, or a negative seed.
    """

    def __init__(self, *, context: int, batch_size: int, seed: int, shuffle: bool) -> None:
        for name, value, least in (("context", context, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ConfigError(f"{name}={value} must be at least {least}")
        self.context, self.batch_size, self.seed, self.shuffle = context, batch_size, seed, shuffle

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """Rows in an epoch, those that are left out included."""

    @abstractmethod
    def rows(self, epoch: int, first: int, end: int) -> Batch:
        """The batch of rows `first` to `end` in the order of an epoch, which is 0 where nothing is shuffled."""

    @final
    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(self.n_rows, self.batch_size)
        return max(full, 1) if self.shuffle else full + (rest > 0)

    @final
    def batch(self, epoch: int, index: int) -> Batch:
        """One batch; the same for the same seed, epoch and index, whatever was asked for before.

        Raises:
            IndexError: `index` is not in 0 <= index < len(self), or `epoch` is negative.
        """
        if not 0 <= index < len(self) or epoch < 0:
            raise IndexError(f"batch {index} of epoch {epoch}: there are {len(self)} batches in an epoch")
        first = index * self.batch_size
        return self.rows(epoch if self.shuffle else 0, first, first + self.batch_size)


class _Plan(NamedTuple):
    """Pieces sorted by row: where each begins in the split, its length, and where each row begins among the pieces."""

    begins: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray

    @property
    def n_rows(self) -> int:
        return len(self.rows) - 1


@final
class PackedBatches(Batches):
    """The batches of a split of documents: rows of `context` steps, in each of them pieces of documents, then padding.

    A document is cut into pieces of at most `context` inputs, so that in an epoch each of its tokens but the first
    `shift` is a target exactly once. Short pieces share a row, and do not see one another. In training every epoch cuts
    each document that is longer than `context` from another random offset. Padding holds 0, and targets of -100 (of
    vectors: 0).

    Args:
        split: The documents.
        shift: A token predicts the one that stands so many tokens behind it. 0: itself.
        frame: Ids to put before each piece and behind it, which have no targets.
        context, batch_size, seed, shuffle: See `Batches`; the seed chooses the cuts as well.

    Raises:
        ConfigError: As for `Batches`, or no document has anything to predict.
    """

    def __init__(
        self,
        split: Split,
        *,
        context: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        shift: int = 1,
        frame: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> None:
        super().__init__(context=context, batch_size=batch_size, seed=seed, shuffle=shuffle)
        self._split, self._shift, self._frame = split, shift, frame
        self._around = len(frame[0]) + len(frame[1])
        if context <= self._around:
            raise ConfigError(f"context={context} leaves no room between {self._around} special tokens; raise it")
        lengths = np.diff(split.offsets) - shift
        self._begins, self._lengths = split.offsets[:-1][lengths > 0], lengths[lengths > 0]
        if not len(self._lengths):
            raise ConfigError(f"the split of {split.n_documents} documents has nothing to predict; use a longer one")
        # The plan of validation; in training it fixes the number of batches, which must not change between epochs.
        self._plain = self._plan(np.zeros_like(self._lengths), None, 1)
        self._latest = (-1, self._plain)

    @property
    def n_rows(self) -> int:
        """Rows of an epoch without random cuts."""
        return self._plain.n_rows

    def rows(self, epoch: int, first: int, end: int) -> Batch:
        if self.shuffle and self._latest[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            long = self._lengths > self.context - self._around
            offsets = random.integers(0, self.context - self._around, len(long)) * long
            self._latest = (epoch, self._plan(offsets, random, self._plain.n_rows))
        plan = self._latest[1]
        return self._fill(plan, range(first, min(end, plan.n_rows)))

    def _plan(self, offsets: np.ndarray, random: np.random.Generator | None, least_rows: int) -> "_Plan":
        return _plan(self._begins, self._lengths, offsets, self.context, random, least_rows, self._around)

    def _fill(self, plan: _Plan, rows: range) -> Batch:
        values, counted = self._split.values, self._split.counted
        dtype = np.float32 if values.ndim == 2 else np.int64
        inputs = np.zeros((len(rows), self.context, *values.shape[1:]), dtype)
        targets = np.full_like(inputs, 0 if values.ndim == 2 else IGNORE)
        before, after = (np.array(part, dtype).reshape(-1, *values.shape[1:]) for part in self._frame)
        lengths: list[tuple[int, ...]] = []
        for i, row in enumerate(rows):
            pieces = slice(plan.rows[row], plan.rows[row + 1])
            lengths.append(tuple((plan.lengths[pieces] + self._around).tolist()))
            place = 0
            for begin, length in zip(plan.begins[pieces].tolist(), plan.lengths[pieces].tolist(), strict=True):
                own = slice(place + len(before), place + len(before) + length)
                inputs[i, place : own.start], inputs[i, own] = before, values[begin : begin + length]
                wanted = slice(begin + self._shift, begin + self._shift + length)
                targets[i, own] = values[wanted]
                if counted is not None:
                    targets[i, own][~counted[wanted]] = IGNORE
                place = own.stop + len(after)
                inputs[i, own.stop : place] = after
        tokens = tokens_of(lengths, self.context)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), tokens)


def _plan(
    begins: np.ndarray,
    lengths: np.ndarray,
    offsets: np.ndarray,
    context: int,
    random: np.random.Generator | None,
    least_rows: int,
    around: int,
) -> _Plan:
    """Cut documents (`lengths` counts targets) and pack the pieces, each with `around` more tokens.

    Every document is cut `offsets` targets after its beginning, and every `context - around` from there. Without
    `random` the longer pieces come first, those of one length in the order of the documents.
    """
    begins, lengths = _cut(begins, lengths, offsets, context - around)
    order = np.arange(len(lengths)) if random is None else random.permutation(len(lengths))
    row_of_piece = np.empty(len(lengths), dtype=np.int64)
    row_of_piece[order] = _spread(_pack(lengths[order] + around, context), least_rows)
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
