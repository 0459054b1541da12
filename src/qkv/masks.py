"""Masks as values: one elementwise predicate each, True = may attend, composed with `&`, `|` and `~`.

Padding, documents and prefixes are not masks: they are data in `Tokens`, and hold under every mask.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch

from qkv.config import Config, config
from qkv.errors import ConfigError
from qkv.shapes import Bool, Int, Tensor
from qkv.tokens import Layout, Tokens


@dataclass(frozen=True)
class Place:
    """Where query or key tokens stand, shaped so that queries and keys broadcast to (B, 1, T, S)."""

    index: Tensor
    order: Tensor


@config
class Mask(Config, ABC):
    """Who may attend to whom."""

    @abstractmethod
    def allow(self, q: Place, k: Place) -> Tensor:
        """True where the query may attend to the key."""

    def __and__(self, other: "Mask") -> "And":
        return And(a=self, b=other)

    def __or__(self, other: "Mask") -> "Or":
        return Or(a=self, b=other)

    def __invert__(self) -> "Not":
        return Not(a=self)


@final
@config
class Full(Mask):
    """Every token sees every token of its document."""

    def allow(self, q: Place, k: Place) -> Tensor:
        """True everywhere."""
        return torch.ones_like(k.order, dtype=torch.bool)


@final
@config
class Causal(Mask):
    """A token sees itself and what comes before it: every key whose order is at most its own."""

    def allow(self, q: Place, k: Place) -> Tensor:
        """`k.order <= q.order`."""
        return k.order <= q.order


@final
@config
class Window(Mask):
    """A token sees those less than `size` tokens away, on both sides. `Causal() & Window(size=n)` slides."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"Window.size={self.size} must be at least 1 (1: a token sees only itself)")

    def allow(self, q: Place, k: Place) -> Tensor:
        """`|q.index - k.index| < size`."""
        return (q.index - k.index).abs() < self.size


@final
@config
class Chunked(Mask):
    """A token sees the tokens of its own chunk of `size` tokens (local attention in blocks)."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"Chunked.size={self.size} must be at least 1")

    def allow(self, q: Place, k: Place) -> Tensor:
        """`q.index // size == k.index // size`."""
        return q.index // self.size == k.index // self.size


@final
@config
class And(Mask):
    """Both masks allow it."""

    a: Mask
    b: Mask

    def allow(self, q: Place, k: Place) -> Tensor:
        """`a & b`."""
        return self.a.allow(q, k) & self.b.allow(q, k)


@final
@config
class Or(Mask):
    """One of the masks allows it."""

    a: Mask
    b: Mask

    def allow(self, q: Place, k: Place) -> Tensor:
        """`a | b`."""
        return self.a.allow(q, k) | self.b.allow(q, k)


@final
@config
class Not(Mask):
    """The mask does not allow it."""

    a: Mask

    def allow(self, q: Place, k: Place) -> Tensor:
        """`~a`."""
        return ~self.a.allow(q, k)


@dataclass(frozen=True)
class LoweredMask:
    """What a mask comes to for the tokens at hand: the least that a kernel has to be told.

    Attributes:
        causal: Query i sees keys up to i, inside its document. With neither of the others set, every row is one
            document and T = S (or nothing is masked at all).
        documents: Document id of each token, 0 for padding, when every document is one unbroken run of its row.
        allow: The mask as a tensor, True = may attend, when nothing simpler will do.
        key_valid: With `allow`: False at padded keys, whose values a kernel must not read.
    """

    causal: bool = False
    documents: Int[Tensor, "B T"] | None = None
    allow: Bool[Tensor, "B 1 T S"] | None = None
    key_valid: Bool[Tensor, "B S"] | None = None

    def dense(self, n_queries: int, n_keys: int, device: torch.device) -> Bool[Tensor, "#B 1 T S"] | None:
        """The mask as a tensor, whatever form it has; None where everything is allowed."""
        if self.allow is not None:
            return self.allow
        mask = None
        if self.causal:
            mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril()[None, None]
        if self.documents is not None:
            q, k = self.documents[:, None, :, None], self.documents[:, None, None, :]
            inside = (q == k) & (k > 0)
            mask = inside if mask is None else mask & inside
        return mask

    def padding(self) -> Bool[Tensor, "B S"] | None:
        """False at padded keys; None where there are none."""
        return self.key_valid if self.documents is None else self.documents > 0


def lower(mask: Mask, q: Tokens, k: Tokens, *, past: bool = False) -> LoweredMask:
    """The least that must be said about `mask` for queries `q` and keys `k`.

    Args:
        mask: Who may attend to whom.
        q: The tokens that ask.
        k: The tokens that answer; `q` itself in self-attention without a cache.
        past: `k` are the tokens of a cache with those of `q` at the end of each row.
    """
    simple = isinstance(mask, (Full, Causal))
    if simple and not past and k is q and q.layout is not Layout.GENERAL:
        documents = None if q.layout is Layout.FULL else q.segment
        return LoweredMask(causal=isinstance(mask, Causal), documents=documents)
    if simple and past and q.shape[1] == 1 and k.layout is Layout.FULL:
        return LoweredMask()  # the newest token sees all that came before it
    # A cache keeps no padding, so there is nothing in it to keep a kernel from reading.
    return LoweredMask(allow=dense(mask, q, k), key_valid=None if past or k.layout is Layout.FULL else k.valid)


def dense(mask: Mask, q: Tokens, k: Tokens) -> Bool[Tensor, "B 1 T S"]:
    """The mask as a tensor, with padding and documents applied. Quadratic: for small inputs, and to define the rest."""
    a, b = q.segment[:, None, :, None], k.segment[:, None, None, :]
    allowed = mask.allow(
        Place(q.index[:, None, :, None], q.order[:, None, :, None]),
        Place(k.index[:, None, None, :], k.order[:, None, None, :]),
    )
    return allowed & (a == b) & (b > 0)
