"""Sublayers that carry a state from token to token."""

from abc import ABC, abstractmethod
from typing import final

from qkv.context import Context
from qkv.documents import Documents
from qkv.nn.mixer import Mixer
from qkv.shapes import Float, Tensor

Kept = tuple[Tensor, ...]
"""What is carried on, each tensor (rows, …)."""


class Stateful(Mixer, ABC):
    """Base of the recurrent and convolutional sublayers. Each document begins anew; the future is never seen."""

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
    def update(self, x: Float[Tensor, "B T D"], ctx: Context) -> tuple[Float[Tensor, "B T D"], None]:
        """Document by document; with a cache, each row goes on where it was."""
        documents, slot = Documents.of(ctx.tokens), ctx.slot + self.seat.slot
        rows = (None if ctx.cache is None else ctx.cache.recall(slot)) or self.fresh(len(x), x)
        out, after = self.run(documents.gather(x), documents, tuple(part[documents.row] for part in rows))
        if ctx.cache is not None:
            pairs = zip(rows, after, strict=True)
            ctx.cache.keep(slot, tuple(part.index_copy(0, documents.row, new.to(part.dtype)) for part, new in pairs))
        return documents.scatter(out), None

    @final
    def state_size(self, d_model: int) -> int:
        return sum(part.numel() for part in self.fresh(1, next(self.parameters()).new_empty(1, d_model)))
