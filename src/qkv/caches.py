"""What decoding keeps: keys and values of the tokens seen so far, preallocated, with rows that may be ragged."""

from collections.abc import Sequence
from typing import NamedTuple, final

import torch

from qkv.errors import ConfigError
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import Layout, Tokens


class CacheShape(NamedTuple):
    """What one application of attention keeps per token."""

    n_kv_heads: int
    head_dim: int
    value_dim: int


@final
class Cache:
    """Keys and values of every application of attention, made by `Transformer.make_cache` and passed to its calls.

    A row holds its tokens without gaps, whatever padding they came with: token i of a row lies in place i. So rows may
    have different lengths, and a prompt padded left, right or not at all leaves the same cache.

    Attributes:
        length: Tokens held, per row.
        bound: At least the largest of `length`, known on the host.
        even: Whether every row holds exactly `bound` tokens.
    """

    def __init__(
        self, shapes: Sequence[CacheShape], batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            # One place more than the capacity: padding is written there and never read.
            return torch.zeros(batch, shape[0], capacity + 1, shape[1], dtype=dtype, device=device)

        self.capacity = capacity
        self._keys = [zeros(shape.n_kv_heads, shape.head_dim) for shape in shapes]
        self._values = [zeros(shape.n_kv_heads, shape.value_dim) for shape in shapes]
        self._order = torch.zeros(batch, capacity + 1, dtype=torch.long, device=device)
        self.length: Int[Tensor, " B"] = torch.zeros(batch, dtype=torch.long, device=device)
        self.bound = 0
        self.even = True
        self._new: Tokens | None = None
        self._place: Tensor | None = None

    def begin(self, new: Tokens) -> Tokens:
        """Make room for `new` tokens; called once per forward pass, by the stack.

        Args:
            new: The tokens to come; their index, order and coordinates count from the start of the document.

        Returns:
            The tokens that attention will see as keys: `new` itself where the cache was empty.

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
        self._new = new
        self._place = None
        if not (self.even and new.layout is Layout.FULL):
            rank = new.valid.long().cumsum(1) - 1
            self._place = torch.where(new.valid, self.length[:, None] + rank, self.capacity)
            self._order.scatter_(1, self._place, new.order)
        else:
            self._order[:, self.bound : self.bound + n] = new.order
        return new if self.bound == 0 else self._held(self.bound + n)

    def _held(self, bound: int) -> Tokens:
        assert self._new is not None
        even = self._place is None
        index = torch.arange(bound, device=self.length.device).expand(len(self.length), bound)
        held = self.length + self._new.valid.sum(1)
        segment = torch.ones_like(index) if even else (index < held[:, None]).long()
        return Tokens(index, self._order[:, :bound], segment, index[..., None], Layout.FULL if even else Layout.RAGGED)

    def update(
        self, slot: int, k: Float[Tensor, "B G T K"], v: Float[Tensor, "B G T v"]
    ) -> tuple[Float[Tensor, "B G S K"], Float[Tensor, "B G S v"]]:
        """Store the keys and values of the new tokens for one application; returns all that it may attend to."""
        keys, values = self._keys[slot], self._values[slot]
        n = k.shape[2]
        if self._place is None:
            keys.narrow(2, self.bound, n).copy_(k)
            values.narrow(2, self.bound, n).copy_(v)
        else:
            place = self._place[:, None, :, None]
            keys.scatter_(2, place.expand_as(k), k)
            values.scatter_(2, place.expand_as(v), v)
        if self.bound == 0:
            return k, v
        return keys.narrow(2, 0, self.bound + n), values.narrow(2, 0, self.bound + n)

    def advance(self) -> None:
        """Count the new tokens as held; called once per forward pass, by the stack, after the last block."""
        assert self._new is not None
        self.length = self.length + self._new.valid.sum(1)
        self.bound += self._new.shape[1]
        self.even = self._place is None
        self._new = self._place = None
