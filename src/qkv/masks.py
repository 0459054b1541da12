"""Masks as values: one elementwise predicate each, True = may attend, composed with `&`, `|` and `~`.

Padding, documents and prefixes are not masks: they are data in `Tokens`, and hold under every mask.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import NamedTuple, cast, final

import torch
import torch.nn.functional as F

from qkv.config import Config, Count, config
from qkv.shapes import Bool, Int, Tensor
from qkv.tokens import Layout, Tokens


@dataclass(frozen=True)
class Place:
    """Where query or key tokens stand, shaped so that queries and keys broadcast to (B, 1, T, S)."""

    index: Tensor
    order: Tensor


class Span(NamedTuple):
    """The lowest and the highest number in each tile."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Tile:
    """Where the tokens of whole tiles stand, shaped so that those of queries and keys broadcast."""

    index: Span
    order: Span


@config
class Mask(Config, ABC):
    """Who may attend to whom."""

    @abstractmethod
    def allow(self, q: Place, k: Place) -> Tensor:
        """True where the query may attend to the key."""

    def draw(self, tokens: "Tokens | int" = 16) -> str:
        """A picture: a line for each query, a sign for each key: █ is seen, · is not, ▒ in part.

        Args:
            tokens: Where the tokens stand (the first row of the batch is drawn), or how many of one full text. Of more
                than 64 several share a sign. Up to a few thousand: the square is made.
        """
        tokens = Tokens.full(1, max(tokens, 0)) if isinstance(tokens, int) else tokens
        if not tokens.valid.numel():
            return ""
        seen = dense(self, tokens, tokens)[0]
        size = -(-seen.shape[-1] // 64)
        full = F.max_pool2d((~seen).float(), size, ceil_mode=True) == 0
        some = F.max_pool2d(seen.float(), size, ceil_mode=True) > 0
        signs = cast("list[list[int]]", (full.int() + some.int())[0].tolist())  # pyright: ignore[reportUnknownMemberType]
        return "\n".join("".join("·▒█"[sign] for sign in row) for row in signs)

    def describe(self) -> str:
        """In a few words: `causal & window 256`."""
        return " ".join([self.tag().lower(), *(f"{getattr(self, f.name):,}" for f in fields(self))])

    @property
    def number(self) -> int:
        """The number of this mask in this process, by which an operator, which takes no objects, finds it again."""
        if self not in _numbered:
            _numbered.append(self)
        return _numbered.index(self)

    @staticmethod
    def numbered(number: int) -> "Mask":
        """The mask that has this `number`."""
        return _numbered[number]

    def tiles(self, q: Tile, k: Tile) -> tuple[Tensor, Tensor]:
        """What holds for whole tiles: where some pair may be allowed, and where all pairs are.

        Both are cautious: "some" may be True for a tile in which nothing is allowed, and "all" False for one in which
        everything is; the other mistakes must not happen. Unless a mask says more, nothing is known.
        """
        unknown = (q.order.low == k.order.low) | True
        return unknown, ~unknown

    @property
    def reach(self) -> int | None:
        """Of the tokens up to itself a query sees none that is `reach` or more tokens back; None: no limit."""
        return None

    def __and__(self, other: "Mask") -> "And":
        return And(a=self, b=other)

    def __or__(self, other: "Mask") -> "Or":
        return Or(a=self, b=other)

    def __invert__(self) -> "Not":
        return Not(a=self)


_numbered: list[Mask] = []


@final
@config
class Full(Mask):
    """Every token sees every token of its document."""

    def allow(self, q: Place, k: Place) -> Tensor:
        return torch.ones_like(k.order, dtype=torch.bool)

    def tiles(self, q: Tile, k: Tile) -> tuple[Tensor, Tensor]:
        every = (q.order.low == k.order.low) | True
        return every, every


@final
@config
class Causal(Mask):
    """A token sees itself and what comes before it: every key whose order is at most its own."""

    def allow(self, q: Place, k: Place) -> Tensor:
        return k.order <= q.order

    def tiles(self, q: Tile, k: Tile) -> tuple[Tensor, Tensor]:
        return k.order.low <= q.order.high, k.order.high <= q.order.low


@final
@config
class Window(Mask):
    """A token sees those less than `size` tokens away, on both sides. `Causal() & Window(size=n)` slides."""

    size: Count

    def allow(self, q: Place, k: Place) -> Tensor:
        return (q.index - k.index).abs() < self.size

    @property
    def reach(self) -> int:
        return self.size

    def tiles(self, q: Tile, k: Tile) -> tuple[Tensor, Tensor]:
        low, high = _distance(q, k)
        nearest = torch.maximum(low, -high).clamp(min=0)
        return nearest < self.size, torch.maximum(high, -low) < self.size


@final
@config
class Chunked(Mask):
    """A token sees the tokens of its own chunk of `size` tokens (local attention in blocks)."""

    size: Count

    def allow(self, q: Place, k: Place) -> Tensor:
        return q.index // self.size == k.index // self.size

    @property
    def reach(self) -> int:
        return self.size

    def tiles(self, q: Tile, k: Tile) -> tuple[Tensor, Tensor]:
        q_low, q_high, k_low, k_high = (x // self.size for x in (*q.index, *k.index))
        overlap = (q_low <= k_high) & (k_low <= q_high)
        return overlap, overlap & (q_low == q_high) & (k_low == k_high)


@final
@config
class Strided(Mask):
    """A token sees those whose distance is a multiple of `stride`, on both sides.

    Source: Child et al. 2019 (Sparse Transformers), section 4.2, whose strided attention is
    `Causal() & (Strided(stride=n) | Window(size=n))`.
    """

    stride: Count

    def allow(self, q: Place, k: Place) -> Tensor:
        return (q.index - k.index) % self.stride == 0

    def tiles(self, q: Tile, k: Tile) -> tuple[Tensor, Tensor]:
        low, high = _distance(q, k)
        multiple = high // self.stride * self.stride >= low
        return multiple, multiple & ((low == high) | (self.stride == 1))


@final
@config
class And(Mask):
    """Both masks allow it."""

    a: Mask
    b: Mask

    def allow(self, q: Place, k: Place) -> Tensor:
        return self.a.allow(q, k) & self.b.allow(q, k)

    def describe(self) -> str:
        return f"{self.a.describe()} & {self.b.describe()}"

    @property
    def reach(self) -> int | None:
        a, b = self.a.reach, self.b.reach
        return b if a is None else a if b is None else min(a, b)

    def tiles(self, q: Tile, k: Tile) -> tuple[Tensor, Tensor]:
        (a_some, a_all), (b_some, b_all) = self.a.tiles(q, k), self.b.tiles(q, k)
        return a_some & b_some, a_all & b_all


@final
@config
class Or(Mask):
    """One of the masks allows it."""

    a: Mask
    b: Mask

    def allow(self, q: Place, k: Place) -> Tensor:
        return self.a.allow(q, k) | self.b.allow(q, k)

    def describe(self) -> str:
        return f"({self.a.describe()} | {self.b.describe()})"

    @property
    def reach(self) -> int | None:
        return None if self.a.reach is None or self.b.reach is None else max(self.a.reach, self.b.reach)

    def tiles(self, q: Tile, k: Tile) -> tuple[Tensor, Tensor]:
        (a_some, a_all), (b_some, b_all) = self.a.tiles(q, k), self.b.tiles(q, k)
        return a_some | b_some, a_all | b_all


@final
@config
class Not(Mask):
    """The mask does not allow it."""

    a: Mask

    def allow(self, q: Place, k: Place) -> Tensor:
        return ~self.a.allow(q, k)

    def describe(self) -> str:
        return f"~{self.a.describe()}"

    def tiles(self, q: Tile, k: Tile) -> tuple[Tensor, Tensor]:
        a_some, a_all = self.a.tiles(q, k)
        return ~a_all, ~a_some


def _distance(q: Tile, k: Tile) -> tuple[Tensor, Tensor]:
    """The lowest and the highest `q.index - k.index` in each tile."""
    return q.index.low - k.index.high, q.index.high - k.index.low


def allowed(mask: Mask, q: Int[Tensor, "3 #B T"], k: Int[Tensor, "3 #B S"]) -> Bool[Tensor, "#B T S"]:
    """The mask for queries and keys of which index, order and segment are given, with padding and documents applied."""
    q_index, q_order, a = q[..., :, None]
    k_index, k_order, b = k[..., None, :]
    return mask.allow(Place(q_index, q_order), Place(k_index, k_order)) & (a == b) & (b > 0)


def dense(mask: Mask, q: Tokens, k: Tokens) -> Bool[Tensor, "#B 1 T S"]:
    """The mask as a tensor, with padding and documents applied. Quadratic: for small inputs, and to define the rest."""
    return allowed(mask, places(q), places(k))[:, None]


def places(tokens: Tokens) -> Int[Tensor, "3 #B T"]:
    """Index, order and segment, in 32 bits for speed; one row if all are alike."""
    alike = tokens.layout is Layout.FULL and tokens.index.stride(0) == 0
    return torch.stack([x[:1] if alike else x for x in (tokens.index, tokens.order, tokens.segment)]).int()


def sees_ahead(mask: Mask) -> bool:
    """Whether a token may attend to one that comes after it, in a text of 64 tokens."""
    tokens = Tokens.full(1, 64, device=torch.device("cpu"))  # also where a model is built without memory
    return bool(dense(mask, tokens, tokens)[0, 0].triu(1).any())
