"""The cache of decoding: keys and values of the tokens seen so far, preallocated, with rows that may be ragged."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch

from qkv.errors import ConfigError
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import Layout, Tokens, join_rows


class CacheShape(NamedTuple):
    """What one application of attention keeps per token.

    Attributes:
        n_kv_heads: Key and value heads; 0: it keeps something else, or nothing.
        head_dim: Width of a key.
        value_dim: Width of a value.
        reach: `Mask.reach` of its mask: how many tokens back it sees; None: all.
    """

    n_kv_heads: int
    head_dim: int
    value_dim: int
    reach: int | None = None


class Storage(ABC):
    """Base of the cache storages: in which place each token of a row lies. Masks of one reach share one.

    Attributes:
        places: Tokens of a row that there is room for. One place more takes the padding and is never read.
        order: `Tokens.order` of what lies in each place.
    """

    def __init__(self, batch: int, places: int, device: torch.device) -> None:
        self.places = places
        self.order: Int[Tensor, "B places"] = torch.zeros(batch, places + 1, dtype=torch.long, device=device)
        self._place: Tensor | None = None  # of each new token; None: behind those of every row

    @abstractmethod
    def begin(self, new: Tokens, length: Int[Tensor, " B"], bound: int, *, even: bool) -> Tokens:
        """Decide where `new` tokens go, behind the `length` that each row holds.

        Returns:
            The tokens that attention will see as keys, in the order in which `write` returns them.
        """

    @abstractmethod
    def write(
        self, held: Float[Tensor, "B G places width"], new: Float[Tensor, "B G T width"]
    ) -> Float[Tensor, "B G S width"]:
        """Store keys or values of the new tokens in place; returns all that attention may see."""


@final
class Dense(Storage):
    """Token i of a row lies in place i."""

    _bound = 0

    def begin(self, new: Tokens, length: Int[Tensor, " B"], bound: int, *, even: bool) -> Tokens:
        n, self._bound = new.shape[1], bound
        if even:
            self._place = None
            self.order[:, bound : bound + n] = new.order
        else:
            self._place = torch.where(new.valid, length[:, None] + _rank(new), self.places)
            self.order.scatter_(1, self._place, new.order)
        if bound == 0:
            return new
        index = torch.arange(bound + n, device=length.device).expand(len(length), bound + n)
        held = length + new.valid.sum(1)
        segment = torch.ones_like(index) if even else (index < held[:, None]).long()
        layout = Layout.FULL if even else Layout.RAGGED
        return Tokens(index, self.order[:, : bound + n], segment, index[..., None], layout)

    def write(
        self, held: Float[Tensor, "B G places width"], new: Float[Tensor, "B G T width"]
    ) -> Float[Tensor, "B G S width"]:
        n = new.shape[2]
        if self._place is None:
            held.narrow(2, self._bound, n).copy_(new)
        else:
            held.scatter_(2, self._place[:, None, :, None].expand_as(new), new)
        return new if self._bound == 0 else held.narrow(2, 0, self._bound + n)


@final
class Ring(Storage):
    """Token i of a row lies in place i modulo `places`, where it overwrites one that nobody sees any more.

    A single token is written first, and the ring is read as it lies. Several would overwrite what the first of them
    still sees, so the ring is read as it was, and the new tokens behind it.
    """

    _mode = "alone"

    def begin(self, new: Tokens, length: Int[Tensor, " B"], bound: int, *, even: bool) -> Tokens:
        count = new.valid.sum(1)
        rank = _rank(new)
        # Of a long input only the last tokens are kept: two must not go to one place.
        kept = new.valid & (rank >= count[:, None] - self.places)
        self._place = torch.where(kept, (length[:, None] + rank) % self.places, self.places)
        before = None if bound == 0 else self._tokens(length)
        self.order = self.order.scatter(1, self._place, new.order)
        self._mode = "alone" if before is None else "ring" if new.shape[1] == 1 else "behind"
        if before is None:
            return new
        return self._tokens(length + count) if self._mode == "ring" else before.followed_by(new)

    def _tokens(self, length: Int[Tensor, " B"]) -> Tokens:
        """What lies in each place once a row has `length` tokens: the latest that belongs there."""
        last = length[:, None] - 1
        place = torch.arange(self.places, device=length.device)
        index = last - (last - place) % self.places
        segment = (index >= 0).long()
        index = index.clamp(min=0)
        return Tokens(index, self.order[:, : self.places], segment, index[..., None], Layout.GENERAL)

    def write(
        self, held: Float[Tensor, "B G places width"], new: Float[Tensor, "B G T width"]
    ) -> Float[Tensor, "B G S width"]:
        assert self._place is not None
        seen = torch.cat([held.narrow(2, 0, self.places), new], 2) if self._mode == "behind" else new
        held.scatter_(2, self._place[:, None, :, None].expand_as(new), new)
        return held.narrow(2, 0, self.places) if self._mode == "ring" else seen


@final
class Cache:
    """What each layer keeps of the tokens seen so far, made by `Transformer.make_cache` and passed to its calls.

    A row holds its tokens without gaps, whatever padding they came with. So rows may have different lengths, and a
    prompt padded left, right or not at all leaves the same cache. Attention whose mask reaches back so far and no
    farther keeps a ring of that many tokens: its memory does not grow with the text. Rows may be copied, dropped, taken
    out, and joined by those of another cache.

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
        self._reach = {slot: shape.reach for slot, shape in enumerate(shapes) if shape.n_kv_heads}
        self._storages = {reach: self._storage(reach, batch, device) for reach in self._reach.values()}
        # Per application: keys and values of tokens, those of a memory, or the state of a recurrent layer.
        self._held: dict[int, tuple[Tensor, ...]] = {}
        for slot, reach in self._reach.items():
            heads, *widths = shapes[slot][:3]
            sizes = (batch, heads, self._storages[reach].places + 1)
            self._held[slot] = tuple(torch.zeros(*sizes, width, dtype=dtype, device=device) for width in widths)
        self._stateful: set[int] = set()
        self.length: Int[Tensor, " B"] = torch.zeros(batch, dtype=torch.long, device=device)
        self._highest = self.length  # tokens that were ever written, before a rollback
        self.bound = 0
        self.even = True
        self._new: Tokens | None = None  # during a forward pass

    def begin(self, new: Tokens) -> dict[int | None, Tokens]:
        """Make room for `new` tokens, which count from the start of the document; called once per forward pass.

        Returns:
            For each `Mask.reach` the tokens that attention will see as keys: `new` itself where the cache was empty.

        Raises:
            ConfigError: There is no room, or `new` holds several documents per row.
        """
        batch, n = new.shape
        if batch != (rows := len(self.length)):
            raise ConfigError(f"the cache has {rows} rows and the input has {batch}; make a cache for {batch}")
        if self.bound + n > self.capacity:
            needs = f"{self.bound} tokens are held and {n} are to come"
            raise ConfigError(f"the cache has room for {self.capacity} tokens: {needs}; make it larger or give it less")
        if new.layout is not Layout.FULL and bool((new.segment > 1).any()):
            raise ConfigError("a cache holds one document per row and the input is packed; give each its own row")
        self._new = new
        if self.bound + n > self._room:
            self._make_room(min(self.capacity, max(2 * self._room, self.bound + n)))
        even = self.even and new.layout is Layout.FULL
        return {reach: each.begin(new, self.length, self.bound, even=even) for reach, each in self._storages.items()}

    def _storage(self, reach: int | None, batch: int, device: torch.device) -> Storage:
        if reach is None or reach + self._rollback >= self.capacity:
            return Dense(batch, self._room, device)
        return Ring(batch, reach + self._rollback, device)

    def _make_room(self, room: int) -> None:
        """Have room for so many tokens. Each doubling copies once what is held: at most as much again in all."""
        before, self._room = self._room, room
        grows = {reach for reach, each in self._storages.items() if isinstance(each, Dense)}
        for reach in grows:
            storage = self._storages[reach]
            storage.order, storage.places = _widened(storage.order, 1, before, room), room
        for slot, reach in self._reach.items():
            if reach in grows:
                self._held[slot] = tuple(_widened(x, 2, before, room) for x in self._held[slot])

    def update(
        self, slot: int, k: Float[Tensor, "B G T K"], v: Float[Tensor, "B G T v"]
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S v"]]:
        """Store the keys and values of the new tokens for one application; returns all that it may attend to."""
        storage, (keys, values) = self._storages[self._reach[slot]], self._held[slot]
        return storage.write(keys, k), storage.write(values, v)

    def remember(
        self, slot: int, compute: Callable[[], tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S v"]]]
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S v"]]:
        """Keys and values of what does not change while decoding (cross-attention): computed the first time only."""
        if slot not in self._held:
            self._held[slot] = compute()
        k, v = self._held[slot]
        return k, v

    def keep(self, slot: int, state: tuple[Tensor, ...]) -> None:
        """Keep what an application carries on from token to token, each tensor (B, …), instead of what it kept last."""
        self._held[slot] = state
        self._stateful.add(slot)

    def recall(self, slot: int) -> tuple[Tensor, ...] | None:
        """What the application kept last; None: nothing yet."""
        return self._held.get(slot)

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
            ConfigError: A row has fewer, a ring has overwritten what came before them, a state was carried on, or a
                forward pass was broken off.
        """
        shortest = int(self.length.min())
        if not 0 <= n <= shortest:
            raise ConfigError(f"rollback of {n} tokens: the shortest row holds {shortest}; take back at most as many")
        if self._new is not None:
            raise ConfigError(f"rollback of {n} tokens: a forward pass was broken off; read the text again")
        if n and self._stateful:
            raise ConfigError(
                f"rollback of {n} tokens: this model has recurrent or convolutional layers, whose past cannot be taken "
                "back; read the text again"
            )
        written = int((self._highest - self.length).max()) + n
        if written > self._rollback and any(isinstance(each, Ring) for each in self._storages.values()):
            raise ConfigError(
                f"rollback of {n} tokens: this cache of windows keeps {self._rollback} to spare; "
                f"make it with rollback={written}"
            )
        self.length, self.bound = self.length - n, self.bound - n

    def reorder(self, rows: Int[Tensor, " b"]) -> None:
        """Go on with these rows, in this order; a row may come twice, or not at all."""
        for storage in self._storages.values():
            storage.order = storage.order[rows]
        for slot, held in self._held.items():
            self._held[slot] = tuple(x[rows] for x in held)
        self.length, self._highest = self.length[rows], self._highest[rows]

    def tighten(self) -> None:
        """Find `bound` and `even` again after the longest rows have left, so that there is room again (a host read)."""
        self.bound = int(self.length.max())
        self.even = self.even or bool((self.length == self.bound).all())

    def take(self, rows: Int[Tensor, " b"]) -> "Cache":
        """A copy of these rows, as a cache of its own."""
        taken = copy.copy(self)
        taken._storages = {reach: copy.copy(storage) for reach, storage in self._storages.items()}
        taken._held = dict(self._held)
        taken.reorder(rows)
        return taken

    def extend(self, other: "Cache") -> None:
        """Put the rows of another cache of the same model below these; the other must not be used any more.

        Raises:
            ConfigError: They were made differently, or one has read something and the other has not.
        """
        if (self.capacity, self._rollback, self._reach) != (other.capacity, other._rollback, other._reach):
            rooms = f"{self.capacity} and {other.capacity} tokens"
            raise ConfigError(f"the caches have room for {rooms}, or are of two models; make them alike")
        if self._held.keys() != other._held.keys():
            raise ConfigError("one cache has read something and the other has not; read the prompts first")
        room = max(self._room, other._room)
        for cache in (self, other):
            if cache._room < room:
                cache._make_room(room)
        for reach, storage in self._storages.items():
            storage.order = join_rows(storage.order, other._storages[reach].order)
        for slot, held in self._held.items():
            self._held[slot] = tuple(join_rows(a, b) for a, b in zip(held, other._held[slot], strict=True))
        self.even = self.even and other.even and self.bound == other.bound
        self.bound = max(self.bound, other.bound)
        self.length = join_rows(self.length, other.length)
        self._highest = join_rows(self._highest, other._highest)

    @property
    def n_bytes(self) -> int:
        """Memory of keys, values and states, in bytes."""
        return sum(x.numel() * x.element_size() for held in self._held.values() for x in held)


def _widened(x: Tensor, dim: int, held: int, places: int) -> Tensor:
    """The same with so many places, and one for padding; what is not written is 0, as padding leaves NaN behind."""
    shape = list(x.shape)
    shape[dim] = places + 1
    wide = x.new_zeros(shape)
    wide.narrow(dim, 0, held).copy_(x.narrow(dim, 0, held))
    return wide


def _rank(new: Tokens) -> Int[Tensor, "B T"]:
    """How many tokens of its row come before each."""
    return new.valid.long().cumsum(1) - 1
