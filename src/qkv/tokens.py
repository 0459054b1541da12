"""What the tokens of a batch are, besides their values: one immutable value from which the rest is derived."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal

import torch
import torch.nn.functional as F

from qkv.errors import ConfigError
from qkv.shapes import Bool, Int, Tensor


class Layout(Enum):
    """What is known on the host about a batch, so that no kernel has to look at the tensors to find out."""

    FULL = "one sequence fills each row; order rises"
    RAGGED = "each document is one unbroken run of its row; order rises inside it; the rest is padding"
    GENERAL = "nothing is known; a mask is built from the tensors"


@dataclass(frozen=True)
class Tokens:
    """Where each token of a batch stands. Masks, positions, loss weights and kernels are derived from it.

    Attributes:
        index: Place inside its own document, in tokens (windows, caches, learned tables).
        order: Causal rank. A token sees those of its own or a lower rank; equal ranks see each other (a prefix).
        segment: Document id; 0 is padding. Tokens of different documents never see each other.
        coords: Position for rotary embeddings and tables: one coordinate for text, row and column for a picture; -1
            where a token of a picture has no place in it, such as a class token.
        layout: What is known without reading the tensors.
        types: Which of several kinds each token is of, for embedders that tell them apart (sentence A and B in BERT,
            patches and each of the trained tokens before them); None: all are of kind 0.
    """

    index: Int[Tensor, "B T"]
    order: Int[Tensor, "B T"]
    segment: Int[Tensor, "B T"]
    coords: Int[Tensor, "B T P"]
    layout: Layout
    types: Int[Tensor, "B T"] | None = None

    @property
    def lengths(self) -> Int[Tensor, "B t"]:
        """Tokens of the document of each, as far as it goes; one column where that is the whole row."""
        if self.layout is Layout.FULL or not self.index.numel():
            return self.index[:, -1:] + 1
        found = self.index.new_zeros(len(self.index), int(self.segment.max()) + 1)
        return found.scatter_reduce(1, self.segment, self.index + 1, "amax").gather(1, self.segment)

    @property
    def extent(self) -> Int[Tensor, "B t P"]:
        """Rows and columns of the picture of each, up to its last place; one column where a picture fills a row."""
        ends = self.coords + 1
        if self.layout is Layout.FULL and ends.numel():
            return ends.amax(1, keepdim=True)
        found = ends.new_zeros(len(ends), int(self.segment.max()) + 1 if ends.numel() else 1, ends.shape[-1])
        segment = self.segment[..., None].expand_as(ends)
        return found.scatter_reduce(1, segment, ends, "amax").gather(1, segment)

    @staticmethod
    def full(
        batch: int, length: int, *, start: int | Int[Tensor, " B"] = 0, device: torch.device | None = None
    ) -> "Tokens":
        """One sequence of `length` tokens per row; `start` is the index of the first, for all rows or one each.

        Raises:
            ConfigError: `start` is a negative number.
        """
        if isinstance(start, Tensor):
            index = torch.arange(length, device=device) + start[:, None]
        elif start < 0:
            raise ConfigError(f"start={start} must be at least 0: an index counts from the start of its document")
        else:
            index = torch.arange(start, start + length, device=device).expand(batch, length)
        return _from_index(index, torch.ones_like(index), Layout.FULL)

    @staticmethod
    def padded(
        lengths: Sequence[int],
        length: int | None = None,
        *,
        side: Literal["left", "right"] = "right",
        device: torch.device | None = None,
    ) -> "Tokens":
        """One document of `lengths[b]` tokens per row, padded to `length` (default: the longest) on `side`.

        Raises:
            ConfigError: A row does not fit into `length`, `side` is neither, or there is no length for each row.
        """
        if side not in ("left", "right"):
            raise ConfigError(f"side={side!r} is unknown; give 'left' or 'right'")
        lengths = _sizes(lengths, "a length for each row, such as Tokens.padded([3, 2])")
        width = max(lengths, default=0) if length is None else length
        for row, n in enumerate(lengths):
            _check_fits(row, n, width)
        slot = torch.arange(width, device=device)
        n = torch.tensor(lengths, dtype=torch.long, device=device)[:, None]
        index = slot - (width - n) if side == "left" else slot.expand(len(lengths), width)
        valid = (index >= 0) & (index < n)
        return _from_index(index * valid, valid.long(), Layout.RAGGED)

    @staticmethod
    def packed(
        lengths: Sequence[Sequence[int]], length: int | None = None, *, device: torch.device | None = None
    ) -> "Tokens":
        """Several documents side by side: row b holds documents of `lengths[b]` tokens, then padding up to `length`.

        Raises:
            ConfigError: The documents of a row do not fit into `length`, or there is no list of lengths for each row.
        """
        lengths = [
            _sizes(row, "for each row the lengths of its documents, such as Tokens.packed([[3, 2], [4]])")
            for row in lengths
        ]
        totals = [sum(row) for row in lengths]
        width = max(totals, default=0) if length is None else length
        index, segment = torch.zeros(2, len(lengths), width, dtype=torch.long)
        for row, sizes in enumerate(lengths):
            _check_fits(row, totals[row], width)
            if sizes:
                n = torch.tensor(sizes)
                starts = n.cumsum(0) - n
                segment[row, : totals[row]] = torch.arange(1, len(sizes) + 1).repeat_interleave(n)
                index[row, : totals[row]] = torch.arange(totals[row]) - starts.repeat_interleave(n)
        return _from_index(index.to(device), segment.to(device), Layout.RAGGED)

    @staticmethod
    def pictures(
        grids: Sequence[Sequence[tuple[int, int]]],
        length: int | None = None,
        *,
        prefix: int = 0,
        device: torch.device | None = None,
    ) -> "Tokens":
        """Several pictures side by side: row b holds those of `grids[b]`, (rows, columns) of patches, then padding.

        The patches of a picture stand row by row; they are of kind 0, and their coordinates are row and column. Before
        them stand `prefix` tokens that an embedder has trained, of kinds 1 to `prefix`, whose coordinates are -1.

        Raises:
            ConfigError: The pictures of a row do not fit into `length`.
        """
        packed = Tokens.packed([[prefix + h * w for h, w in row] for row in grids], length)
        coords = torch.zeros(*packed.shape, 2, dtype=torch.long)
        for row, sizes in enumerate(grids):
            places = [
                F.pad(torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2), (0, 0, prefix, 0), value=-1)
                for h, w in sizes
            ]
            if places:
                coords[row, : sum(map(len, places))] = torch.cat(places)
        full = all(len(row) == 1 for row in grids) and bool(packed.valid.all())
        types = (packed.index + 1) * (coords[..., 0] < 0) if prefix else None
        made = replace(packed, coords=coords, layout=Layout.FULL if full else packed.layout, types=types)
        return made if device is None else made.to(device)

    @staticmethod
    def from_padding(valid: Bool[Tensor, "B T"]) -> "Tokens":
        """From the `attention_mask` of other libraries: True (or 1) is a token, False padding, anywhere in the row.

        Raises:
            ConfigError: It is a mask of numbers to add to scores, which is 0 where this is True.
        """
        if valid.is_floating_point():
            raise ConfigError(
                f"the mask is of {valid.dtype}; give one that is True at tokens (of an additive one: == 0)"
            )
        real = valid.bool()
        index = (real.cumsum(1) - 1).clamp(min=0) * real
        runs = (real[:, :1].long() + (real[:, 1:] & ~real[:, :-1]).sum(1, keepdim=True)).max()
        return _from_index(index, real.long(), Layout.RAGGED if runs.item() <= 1 else Layout.GENERAL)

    @property
    def valid(self) -> Bool[Tensor, "B T"]:
        """True where there is a token, False where there is padding."""
        return self.segment > 0

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.index.shape[0], self.index.shape[1]

    @property
    def _tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        four = {"index": self.index, "order": self.order, "segment": self.segment, "coords": self.coords}
        return four if self.types is None else four | {"types": self.types}

    def _beside(self, other: "Tokens") -> dict[str, tuple[Tensor, Tensor]]:
        """Each tensor with the other's of that name."""
        if (self.types is None) == (other.types is None):
            theirs = other._tensors
            return {name: (x, theirs[name]) for name, x in self._tensors.items()}
        return self.with_types(self.kinds)._beside(other.with_types(other.kinds))

    @property
    def kinds(self) -> Int[Tensor, "B T"]:
        """`types`, with zeros where there are none."""
        return torch.zeros_like(self.index) if self.types is None else self.types

    def shifted(self, by: Int[Tensor, " B"]) -> "Tokens":
        """The same tokens, standing `by[b]` tokens later in their documents (after what a cache holds)."""
        by = by[:, None]
        return replace(self, index=self.index + by, order=self.order + by, coords=self.coords + by[..., None])

    def with_prefix(self, n: int | Int[Tensor, " B"]) -> "Tokens":
        """The same with the first `n` tokens of each document seeing each other under a causal mask (a prefix LM)."""
        first = n if isinstance(n, int) else n[:, None]
        order = torch.maximum(self.index, torch.as_tensor(first, device=self.index.device) - 1)
        return replace(self, order=order, layout=Layout.GENERAL)

    def with_blocks(self, size: int) -> "Tokens":
        """The same with each `size` neighbours of a document seeing each other under a causal mask (block by block).

        Raises:
            ConfigError: `size` is below 1.
        """
        if size < 1:
            raise ConfigError(f"size={size} must be at least 1 (1: each token sees only what comes before it)")
        return replace(self, order=self.index // size * size + size - 1, layout=Layout.GENERAL)

    def with_types(self, types: Int[Tensor, "B T"]) -> "Tokens":
        """The same with the kind of each token, such as 0 in sentence A and 1 in sentence B.

        Raises:
            ConfigError: They are of another shape.
        """
        if types.shape != self.shape:
            raise ConfigError(f"types are {tuple(types.shape)} and the tokens {self.shape} (B, T); make them equal")
        return replace(self, types=types)

    def to(self, device: torch.device) -> "Tokens":
        """The same on a device."""
        return replace(self, **{name: x.to(device) for name, x in self._tensors.items()})

    def take(self, rows: Int[Tensor, " b"]) -> "Tokens":
        """Some of the rows, in this order."""
        return replace(self, **{name: x[rows] for name, x in self._tensors.items()})

    def reordered(self, places: Int[Tensor, " t"]) -> "Tokens":
        """Those at these places of each row, in this order; each stands where it stood."""
        return replace(self, **{name: x[:, places] for name, x in self._tensors.items()}, layout=Layout.GENERAL)

    def join(self, other: "Tokens") -> "Tokens":
        """The rows of both; those of the shorter one are padded on the right."""
        layouts = {self.layout, other.layout}
        if layouts == {Layout.FULL} and self.shape[1] == other.shape[1]:
            layout = Layout.FULL
        else:
            layout = Layout.GENERAL if Layout.GENERAL in layouts else Layout.RAGGED
        return Tokens(**{name: join_rows(a, b) for name, (a, b) in self._beside(other).items()}, layout=layout)

    def followed_by(self, other: "Tokens") -> "Tokens":
        """The tokens of both side by side, row by row."""
        joined = {name: torch.cat(pair, 1) for name, pair in self._beside(other).items()}
        return Tokens(**joined, layout=Layout.GENERAL)


def placed(x: Tensor, tokens: Tokens | None) -> Tokens:
    """Where inputs or a stream, (B, T, …), stand: as given; None: each row is one full sequence.

    Raises:
        ConfigError: `tokens` is of another kind or has another shape, or `x` has no rows.
    """
    if x.dim() < 2:
        raise ConfigError(f"the input is {tuple(x.shape)} and must be (B, T) or (B, T, F); give one text as x[None]")
    if tokens is None:
        return Tokens.full(*x.shape[:2], device=x.device)
    if not isinstance(tokens, Tokens):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"tokens is a {type(tokens).__name__}; give Tokens.padded(lengths), or Tokens.from_padding(mask) of a mask "
            "that is True at tokens"
        )
    if tokens.shape != x.shape[:2]:
        raise ConfigError(f"tokens are {tokens.shape} and inputs {tuple(x.shape[:2])} (B, T); make them equal")
    return tokens


def _from_index(index: Tensor, segment: Tensor, layout: Layout) -> Tokens:
    return Tokens(index, index, segment, index[..., None], layout)


def _sizes(lengths: Any, instead: str) -> list[int]:
    try:
        sizes = [operator.index(n) for n in lengths]
    except TypeError:
        raise ConfigError(f"{lengths!r} is no list of lengths; give {instead}") from None
    if max(sizes, default=0) >= 2**31:
        raise ConfigError(f"a length of {max(sizes)} tokens is beyond any size; give a smaller one")
    return sizes


def _check_fits(row: int, n: int, width: int) -> None:
    if not 0 <= n <= width:
        raise ConfigError(f"row {row} has {n} tokens and the batch has length {width}; cut the row or raise the length")


def join_rows(a: Tensor, b: Tensor) -> Tensor:
    """The rows of both; whichever is smaller in another dimension is filled up with zeros."""
    sizes = [max(pair) for pair in zip(a.shape[1:], b.shape[1:], strict=True)]
    both = a.new_zeros(len(a) + len(b), *sizes)
    for rows, x in ((both[: len(a)], a), (both[len(a) :], b)):
        rows[tuple(slice(n) for n in x.shape)] = x
    return both


def pad_ids(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Int[Tensor, "B T"], Tokens]:
    """Token ids as one batch, padded on the right where their lengths differ, and where they stand."""
    lengths = [len(text) for text in texts]
    ids = torch.zeros(len(texts), max(lengths), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    even = min(lengths) == max(lengths)
    tokens = Tokens.full(*ids.shape, device=device) if even else Tokens.padded(lengths, device=device)
    return ids.to(device), tokens
