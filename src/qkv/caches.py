"""What decoding keeps: keys and values of the tokens seen so far, preallocated, with rows that may be ragged."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch

from qkv.errors import ConfigError
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import Layout, Tokens

SEARCH_ROOM = 32
"""Tokens to come for which a beam search makes room at first: it copies all of it whenever texts change places."""


class CacheShape(NamedTuple):
    """What one application of attention keeps per token.

    Attributes:
        n_kv_heads: Key and value heads.
        head_dim: Width of a key.
        value_dim: Width of a value.
        reach: `Mask.reach` of its mask: how many tokens back it sees; None: all.
    """

    n_kv_heads: int
    head_dim: int
    value_dim: int
    reach: int | None = None


class Filing(ABC):
    """Base of the ways to file tokens away, of which each application of attention uses one."""

    places: int
    """Tokens of a row that there is room for."""

    @abstractmethod
    def begin(self, new: Tokens, length: Int[Tensor, " B"], bound: int, *, even: bool) -> Tokens:
        """Decide where `new` tokens go, behind the `length` that each row holds.

        Returns:
            The tokens that attention will see as keys, in the order in which `write` hands them out.
        """

    @abstractmethod
    def write(
        self, held: Float[Tensor, "B G places width"], new: Float[Tensor, "B G T width"]
    ) -> Float[Tensor, "B G S width"]:
        """Store keys or values of the new tokens in place; returns all that attention may see."""

    @abstractmethod
    def take_rows(self, rows: Int[Tensor, " b"]) -> None:
        """Go on with these rows."""

    def widen(self, places: int) -> bool:
        """Have so many places, if it has one for each token; returns whether it has."""
        return False


@final
class Dense(Filing):
    """Token i of a row lies in place i."""

    def __init__(self, batch: int, places: int, device: torch.device) -> None:
        self.places = places
        self._order = torch.zeros(batch, places + 1, dtype=torch.long, device=device)
        self._place: Tensor | None = None
        self._bound = 0

    def begin(self, new: Tokens, length: Int[Tensor, " B"], bound: int, *, even: bool) -> Tokens:
        """See `Filing`. Where all rows are alike, what is kept is a slice."""
        n, self._bound = new.shape[1], bound
        if even:
            self._place = None
            self._order[:, bound : bound + n] = new.order
        else:
            self._place = torch.where(new.valid, length[:, None] + _rank(new), self.places)
            self._order.scatter_(1, self._place, new.order)
        if bound == 0:
            return new
        index = torch.arange(bound + n, device=length.device).expand(len(length), bound + n)
        held = length + new.valid.sum(1)
        segment = torch.ones_like(index) if even else (index < held[:, None]).long()
        layout = Layout.FULL if even else Layout.RAGGED
        return Tokens(index, self._order[:, : bound + n], segment, index[..., None], layout)

    def write(
        self, held: Float[Tensor, "B G places width"], new: Float[Tensor, "B G T width"]
    ) -> Float[Tensor, "B G S width"]:
        """See `Filing`."""
        n = new.shape[2]
        if self._place is None:
            held.narrow(2, self._bound, n).copy_(new)
        else:
            held.scatter_(2, self._place[:, None, :, None].expand_as(new), new)
        return new if self._bound == 0 else held.narrow(2, 0, self._bound + n)

    def take_rows(self, rows: Int[Tensor, " b"]) -> None:
        """See `Filing`."""
        self._order = self._order[rows]

    def widen(self, places: int) -> bool:
        """See `Filing`."""
        self._order = _widened(self._order, 1, self.places, places)
        self.places = places
        return True


@final
class Ring(Filing):
    """Token i of a row lies in place i modulo `places`, where it takes the place of one that nobody sees any more."""

    def __init__(self, batch: int, places: int, device: torch.device) -> None:
        self.places = places
        self._order = torch.zeros(batch, places + 1, dtype=torch.long, device=device)
        self._place: Tensor = self._order
        self._mode = "alone"

    def begin(self, new: Tokens, length: Int[Tensor, " B"], bound: int, *, even: bool) -> Tokens:
        """See `Filing`.

        A single token is written first, and the ring is read as it lies. Several would overwrite what the first of them
        still sees, so the ring is read as it was, and the new tokens behind it.
        """
        count = new.valid.sum(1)
        rank = _rank(new)
        # Of a long input only the last tokens are kept: two must not go to one place.
        kept = new.valid & (rank >= count[:, None] - self.places)
        self._place = torch.where(kept, (length[:, None] + rank) % self.places, self.places)
        before = None if bound == 0 else self._tokens(length)
        self._order = self._order.scatter(1, self._place, new.order)
        if before is None:
            self._mode = "alone"
            return new
        if new.shape[1] == 1:
            self._mode = "ring"
            return self._tokens(length + count)
        self._mode = "behind"
        return _behind(before, new)

    def _tokens(self, length: Int[Tensor, " B"]) -> Tokens:
        """What lies in each place once a row has `length` tokens: the latest that belongs there."""
        last = length[:, None] - 1
        place = torch.arange(self.places, device=length.device)
        index = last - (last - place) % self.places
        segment = (index >= 0).long()
        index = index.clamp(min=0)
        return Tokens(index, self._order[:, : self.places], segment, index[..., None], Layout.GENERAL)

    def write(
        self, held: Float[Tensor, "B G places width"], new: Float[Tensor, "B G T width"]
    ) -> Float[Tensor, "B G S width"]:
        """See `Filing`."""
        seen = new
        if self._mode == "behind":
            seen = torch.cat([held.narrow(2, 0, self.places), new], 2)
        held.scatter_(2, self._place[:, None, :, None].expand_as(new), new)
        return held.narrow(2, 0, self.places) if self._mode == "ring" else seen

    def take_rows(self, rows: Int[Tensor, " b"]) -> None:
        """See `Filing`."""
        self._order = self._order[rows]


@final
class Cache:
    """Keys and values of every application of attention, made by `Transformer.make_cache` and passed to its calls.

    A row holds its tokens without gaps, whatever padding they came with. So rows may have different lengths, and a
    prompt padded left, right or not at all leaves the same cache. Attention whose mask reaches back so far and no
    farther keeps a ring of that many tokens: its memory does not grow with the text.

    Attributes:
        length: Tokens held, per row.
        bound: At least the largest of `length`, known on the host.
        even: Whether every row holds exactly `bound` tokens.
    """

    def __init__(
        self,
        shapes: Sequence[CacheShape],
        batch: int,
        capacity: int,
        *,
        rollback: int = 0,
        room: int | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.capacity, self._rollback = capacity, rollback
        self._room = capacity if room is None else min(room, capacity)
        self._filings = {reach: self._filing(reach, batch, device) for _, _, _, reach in shapes}
        self._filing_of = [self._filings[shape.reach] for shape in shapes]

        def zeros(filing: Filing, heads: int, width: int) -> Tensor:
            # One place more than there is room for: padding is written there and never read.
            return torch.zeros(batch, heads, filing.places + 1, width, dtype=dtype, device=device)

        pairs = list(zip(shapes, self._filing_of, strict=True))
        self._keys = [zeros(filing, shape.n_kv_heads, shape.head_dim) for shape, filing in pairs]
        self._values = [zeros(filing, shape.n_kv_heads, shape.value_dim) for shape, filing in pairs]
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}
        self._states: dict[int, tuple[Tensor, ...]] = {}
        self.length: Int[Tensor, " B"] = torch.zeros(batch, dtype=torch.long, device=device)
        self._highest = self.length  # tokens that were ever written, before a rollback
        self.bound = 0
        self.even = True
        self._new: Tokens | None = None

    def begin(self, new: Tokens) -> dict[int | None, Tokens]:
        """Make room for `new` tokens; called once per forward pass, by the stack.

        Args:
            new: The tokens to come; their index, order and coordinates count from the start of the document.

        Returns:
            For each `Mask.reach` the tokens that attention will see as keys: `new` itself where the cache was empty.

        Raises:
            ConfigError: There is no room, or `new` holds several documents per row.
        """
        batch, n = new.shape
        if batch != len(self.length):
            raise ConfigError(
                f"the cache has {len(self.length)} rows and the input has {batch}; make a cache for {batch}"
            )
        if self.bound + n > self.capacity:
            needs = f"{self.bound} tokens are held and {n} are to come"
            raise ConfigError(f"the cache has room for {self.capacity} tokens: {needs}; make it larger or give it less")
        if new.layout is not Layout.FULL and bool((new.segment > 1).any()):
            raise ConfigError(
                "a cache holds one document per row and the input is packed; give each document its own row"
            )
        if self.bound + n > self._room:
            self._make_room(min(self.capacity, max(2 * self._room, self.bound + n)))
        self._new = new
        even = self.even and new.layout is Layout.FULL
        return {reach: filing.begin(new, self.length, self.bound, even=even) for reach, filing in self._filings.items()}

    def _filing(self, reach: int | None, batch: int, device: torch.device) -> Filing:
        if reach is None or reach + self._rollback >= self.capacity:
            return Dense(batch, self._room, device)
        return Ring(batch, reach + self._rollback, device)

    def _make_room(self, room: int) -> None:
        """Have room for so many tokens. Each doubling copies once what is held: at most as much again in all."""
        before = self._room
        self._room = room
        grows = {id(filing) for filing in self._filings.values() if filing.widen(room)}
        for slot, filing in enumerate(self._filing_of):
            if id(filing) in grows:
                self._keys[slot] = _widened(self._keys[slot], 2, before, room)
                self._values[slot] = _widened(self._values[slot], 2, before, room)

    def update(
        self, slot: int, k: Float[Tensor, "B G T K"], v: Float[Tensor, "B G T v"]
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S v"]]:
        """Store the keys and values of the new tokens for one application; returns all that it may attend to."""
        filing = self._filing_of[slot]
        return filing.write(self._keys[slot], k), filing.write(self._values[slot], v)

    def remember(
        self, slot: int, compute: Callable[[], tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S v"]]]
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S v"]]:
        """Keys and values of what does not change while decoding (cross-attention): computed the first time only."""
        if slot not in self._memory:
            self._memory[slot] = compute()
        return self._memory[slot]

    def keep(self, slot: int, state: tuple[Tensor, ...]) -> None:
        """Keep what an application carries on from token to token, each tensor (B, …); takes the place of the last."""
        self._states[slot] = state

    def recall(self, slot: int) -> tuple[Tensor, ...] | None:
        """What the application kept last; None: nothing yet."""
        return self._states.get(slot)

    def advance(self) -> None:
        """Count the new tokens as held; called once per forward pass, by the stack, after the last block."""
        assert self._new is not None
        self.length = self.length + self._new.valid.sum(1)
        self._highest = torch.maximum(self._highest, self.length)
        self.bound += self._new.shape[1]
        self.even = self.even and self._new.layout is Layout.FULL
        self._new = None

    def rollback(self, n: int) -> None:
        """Forget the last `n` tokens of every row.

        Raises:
            ConfigError: A row has fewer, a ring has overwritten what came before them, or a state was carried on.
        """
        shortest = int(self.length.min())
        if not 0 <= n <= shortest:
            raise ConfigError(f"rollback of {n} tokens: the shortest row holds {shortest}; take back at most as many")
        if n and self._states:
            raise ConfigError(
                f"rollback of {n} tokens: this model has recurrent or convolutional layers, whose past cannot be taken "
                "back; read the text again"
            )
        written = int((self._highest - self.length).max()) + n
        if written > self._rollback and any(isinstance(filing, Ring) for filing in self._filings.values()):
            raise ConfigError(
                f"rollback of {n} tokens: this cache of windows keeps {self._rollback} to spare; "
                f"make it with rollback={written}"
            )
        self.length, self.bound = self.length - n, self.bound - n

    def reorder(self, rows: Int[Tensor, " b"]) -> None:
        """Go on with these rows, in this order; a row may come twice, or not at all (beam search)."""
        for filing in self._filings.values():
            filing.take_rows(rows)
        self._keys = [x[rows] for x in self._keys]
        self._values = [x[rows] for x in self._values]
        self._memory = {slot: (k[rows], v[rows]) for slot, (k, v) in self._memory.items()}
        self._states = {slot: tuple(part[rows] for part in state) for slot, state in self._states.items()}
        self.length, self._highest = self.length[rows], self._highest[rows]

    @property
    def n_bytes(self) -> int:
        """Memory of keys, values and states, in bytes."""
        memory = [x for kept in (*self._memory.values(), *self._states.values()) for x in kept]
        return sum(x.numel() * x.element_size() for x in (*self._keys, *self._values, *memory))


def _widened(x: Tensor, dim: int, held: int, places: int) -> Tensor:
    """The same with so many places, and one to throw away; what is not written is 0, as padding leaves NaN behind."""
    shape = list(x.shape)
    shape[dim] = places + 1
    wide = x.new_zeros(shape)
    wide.narrow(dim, 0, held).copy_(x.narrow(dim, 0, held))
    return wide


def _rank(new: Tokens) -> Int[Tensor, "B T"]:
    """How many tokens of its row come before each."""
    return new.valid.long().cumsum(1) - 1


def _behind(before: Tokens, new: Tokens) -> Tokens:
    """The tokens of both, side by side."""
    pairs = (
        (before.index, new.index),
        (before.order, new.order),
        (before.segment, new.segment),
        (before.coords, new.coords),
    )
    return Tokens(*(torch.cat(pair, 1) for pair in pairs), layout=Layout.GENERAL)
