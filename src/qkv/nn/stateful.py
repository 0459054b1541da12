"""Sublayers that carry something from token to token: what they share with attention in a stack and a cache."""

from abc import ABC, abstractmethod
from typing import final

from qkv.caches import CacheShape
from qkv.context import Context
from qkv.documents import Documents
from qkv.nn.mixer import Seat
from qkv.nn.sublayer import Aux, Sublayer
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens

Kept = tuple[Tensor, ...]
"""What is carried on, each tensor (rows, …)."""


class Stateful(Sublayer, ABC):
    """Base of the recurrent and convolutional sublayers. Each document begins anew; the future is never seen.

    Attributes:
        seat: Where the cache keeps the state of this layer.
    """

    seat: Seat = Seat()

    @abstractmethod
    def run(self, x: Float[Tensor, "N L D"], documents: Documents, state: Kept) -> tuple[Float[Tensor, "N L D"], Kept]:
        """The updates of documents that begin at the left, and the state behind each.

        Args:
            x: What the documents bring.
            documents: How long they are.
            state: Where each goes on from.
        """

    @abstractmethod
    def fresh(self, n: int, like: Tensor) -> Kept:
        """The state of `n` documents before their first token."""

    @final
    def update(self, x: Float[Tensor, "B T D"], ctx: Context | None) -> tuple[Float[Tensor, "B T D"], Aux | None]:
        tokens = Tokens.full(x.shape[0], x.shape[1], device=x.device) if ctx is None else ctx.tokens
        documents = Documents.of(tokens)
        cache = None if ctx is None else ctx.cache
        slot = self.seat.slot + (0 if ctx is None else ctx.slot)
        rows = self.fresh(len(x), x) if cache is None else (cache.recall(slot) or self.fresh(len(x), x))
        state = tuple(part[documents.row] for part in rows)
        out, after = self.run(documents.gather(x), documents, state)
        if cache is not None:
            pairs = zip(rows, after, strict=True)
            cache.keep(slot, tuple(part.index_copy(0, documents.row, new.to(part.dtype)) for part, new in pairs))
        return documents.scatter(out), None

    @final
    def state_size(self, d_model: int) -> int:
        return sum(part.numel() for part in self.fresh(1, next(self.parameters()).new_empty(1, d_model)))

    @final
    def cache_shape(self) -> CacheShape:
        """No keys and values: the state does not grow with the text."""
        return CacheShape(0, 0, 0)
