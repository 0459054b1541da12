"""Decoding: texts that a model is writing, and what may follow each, whatever the model keeps of what it has read."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import final

import torch

from qkv.caches import Cache
from qkv.context import Memory
from qkv.recorder import Recorder
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import join_rows, pad_ids

ROOM = 32
"""Tokens to come for which there is memory at first; it doubles as they come."""


class Decoding(ABC):
    """Unfinished texts of a model, one a row: the one way to write tokens, made by the model's `start`.

    Rows have no influence on each other. Between two tokens they may be copied, leave, and be joined by others.

    Attributes:
        logits: Of the next token of each row, (R, V).
    """

    logits: Float[Tensor, "R V"]

    @abstractmethod
    def advance(self, ids: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """Append one token to each row; returns the new logits."""

    @abstractmethod
    def reorder(self, rows: Int[Tensor, " r"]) -> None:
        """Go on with these rows, in this order; a row may come twice, or not at all."""
        self.logits = self.logits[rows]

    @abstractmethod
    def join(self, other: "Decoding") -> None:
        """Put the rows of another decoding of the same model below these; the other must not be used any more."""
        self.logits = join_rows(self.logits, other.logits)

    def leave(self, rows: Collection[int]) -> None:
        """Drop some of the rows, not all; those below move up."""
        self.reorder(torch.tensor([row for row in range(len(self.logits)) if row not in rows]))


@final
class CachedDecoding(Decoding):
    """Texts of a Transformer with a cache, and with the memory that its cross-attention reads."""

    def __init__(
        self,
        encode: Callable[..., tuple[Tensor, object]],
        readout: Callable[[Tensor], Tensor],
        cache: Cache,
        memory: Memory | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._encode, self._readout, self._recorder = encode, readout, recorder
        self.cache, self._memory = cache, memory

    @torch.inference_mode()
    def read(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, "R V"]:
        """Append tokens to each row, at least one, in one forward pass; returns the new logits."""
        device = self.cache.length.device
        ids, tokens = pad_ids(texts, device)
        x, _ = self._encode(ids, tokens, cache=self.cache, memory=self._memory, recorder=self._recorder)
        last = torch.tensor([len(text) - 1 for text in texts], device=device)
        # Only the last tokens go through the head: (R, V) logits, never (R, T, V).
        self.logits = self._readout(x[torch.arange(len(texts), device=device), last, None])[:, 0]
        return self.logits

    @torch.inference_mode()
    def advance(self, ids: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        ids = ids.to(self.cache.length.device)[:, None]
        x, _ = self._encode(ids, cache=self.cache, memory=self._memory, recorder=self._recorder)
        self.logits = self._readout(x)[:, 0]
        return self.logits

    def reorder(self, rows: Int[Tensor, " r"]) -> None:
        super().reorder(rows)
        self.cache.reorder(rows)
        if self._memory is not None:
            self._memory = Memory(self._memory.x[rows], self._memory.tokens.take(rows))

    def leave(self, rows: Collection[int]) -> None:
        """Drop some of the rows; where the longest goes, there is room for more tokens of the others."""
        super().leave(rows)
        self.cache.tighten()

    def join(self, other: Decoding) -> None:
        assert isinstance(other, CachedDecoding)
        super().join(other)
        self.cache.extend(other.cache)
        if self._memory is not None and other._memory is not None:
            x = join_rows(self._memory.x, other._memory.x)
            self._memory = Memory(x, self._memory.tokens.join(other._memory.tokens))
