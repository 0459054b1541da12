"""Decoding: texts that a model is writing, and what may follow each, whatever the model keeps of what it has read."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import final

import torch

from qkv.caches import Cache
from qkv.context import Memory
from qkv.models.stack import Stack
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
    """Texts of a Transformer with a cache, and with the memory that its cross-attention reads.

    Attributes:
        cache: What was read.
        recorder: Handed queries, keys and outputs of every attention.
    """

    def __init__(
        self,
        encode: Callable[..., tuple[Tensor, object]],
        readout: Callable[[Tensor], Tensor],
        stack: Stack,
        cache: Cache,
        memory: Memory | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._encode, self._readout, self._stack, self.recorder = encode, readout, stack, recorder
        self.cache, self._memory = cache, memory
        self._texts: list[list[int]] = [[] for _ in cache.length]  # kept up where a length may turn all keys anew

    @torch.inference_mode()
    def read(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, "R V"]:
        """Append tokens to each row, at least one, in one forward pass; returns the new logits."""
        device = self.cache.length.device
        if self._stack.rotates_by_length:
            texts = self._whole_where_stale(texts)
        ids, tokens = pad_ids(texts, device)
        x, _ = self._encode(ids, tokens, cache=self.cache, memory=self._memory, recorder=self.recorder)
        last = torch.tensor([len(text) - 1 for text in texts], device=device)
        # Only the last tokens go through the head: (R, V) logits, never (R, T, V).
        self.logits = self._readout(x[torch.arange(len(texts), device=device), last, None])[:, 0]
        return self.logits

    def _whole_where_stale(self, new: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """The tokens to read: the new ones; or all texts, into an empty cache, if one outgrows its keys."""
        held = [text[:n] for text, n in zip(self._texts, self.cache.length.tolist(), strict=True)]
        self._texts = [[*text, *more] for text, more in zip(held, new, strict=True)]
        if all(self._stack.keeps(len(text), len(grown)) for text, grown in zip(held, self._texts, strict=True)):
            return new
        self.cache = self._stack.make_cache(len(new), self.cache.capacity)
        return self._texts

    @torch.inference_mode()
    def advance(self, ids: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        if self._stack.rotates_by_length:
            return self.read(ids[:, None].tolist())
        ids = ids.to(self.cache.length.device)[:, None]
        x, _ = self._encode(ids, cache=self.cache, memory=self._memory, recorder=self.recorder)
        self.logits = self._readout(x)[:, 0]
        return self.logits

    def reorder(self, rows: Int[Tensor, " r"]) -> None:
        """Go on with these rows; where the longest goes, there is room for more tokens of the others."""
        super().reorder(rows)
        self.cache.reorder(rows)
        self.cache.tighten()
        self._texts = [self._texts[row] for row in rows.tolist()]
        if self._memory is not None:
            self._memory = Memory(self._memory.x[rows], self._memory.tokens.take(rows))

    def join(self, other: Decoding) -> None:
        assert isinstance(other, CachedDecoding)
        super().join(other)
        self.cache.extend(other.cache)
        self._texts += other._texts
        if self._memory is not None and other._memory is not None:
            x = join_rows(self._memory.x, other._memory.x)
            self._memory = Memory(x, self._memory.tokens.join(other._memory.tokens))
