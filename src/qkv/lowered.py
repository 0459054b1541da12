"""Lowered masks: a mask over the tokens at hand, in the simplest form that a kernel can use."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import torch

from qkv.documents import document_bounds
from qkv.masks import Causal, Full, Mask, allowed, places
from qkv.shapes import Bool, Int, Tensor
from qkv.tiles import TiledMask, tile_kinds
from qkv.tokens import Layout, Tokens

T = TypeVar("T")

DENSE_PAIRS = 2**18
"""Up to so many queries times keys in a row, a mask that needs a tensor is made as one."""

SHORT = 64
"""In padded rows of at most so many tokens a mask costs less than taking the documents apart: a quarter with 16, two
thirds with 64. From 128 on it costs more (`benchmarks/short_rows.py`)."""


class Form(Enum):
    """How much has to be said about a mask, from the least to the most."""

    OPEN = "every query sees every key"
    CAUSAL = "query i sees the keys up to i, and there are as many queries as keys"
    DOCUMENTS = "CAUSAL or OPEN inside documents, each an unbroken run of its row"
    DENSE = "any mask, on a small square"
    TILES = "any mask, on a large square"


@dataclass(frozen=True, eq=False)
class LoweredMask:
    """A mask over the tokens at hand, in the simplest form that a kernel can use.

    It is made once per forward pass, by `lower`, for all layers and for the backward pass. What kernels read of it is
    computed when it is first asked for, and kept.

    Attributes:
        mask: Who may attend to whom.
        queries: Where the queries stand.
        keys: Where the keys stand.
        form: How much a kernel has to know.
        query_valid: False at padded queries; None: there are none.
        key_valid: The same for keys.
    """

    mask: Mask
    queries: Tokens
    keys: Tokens
    form: Form
    query_valid: Bool[Tensor, "B T"] | None = None
    key_valid: Bool[Tensor, "B S"] | None = None
    _kept: dict[str, Any] = field(default_factory=lambda: {}, init=False)

    @property
    def size(self) -> tuple[int, int]:
        """Queries and keys in a row."""
        return self.queries.shape[1], self.keys.shape[1]

    @property
    def plain(self) -> bool:
        """Whether no kernel needs more than `causal`."""
        return self.form in (Form.OPEN, Form.CAUSAL)

    @property
    def causal(self) -> bool:
        """Whether query i sees the keys up to i of its document, in a form in which that is all."""
        return self.form is Form.CAUSAL or (self.form is Form.DOCUMENTS and isinstance(self.mask, Causal))

    @property
    def at_hand(self) -> bool:
        """Whether `lower` made `dense`."""
        return self.form is Form.DENSE or (self.form is Form.DOCUMENTS and self.size[0] <= SHORT)

    @property
    def places(self) -> tuple[Int[Tensor, "3 #B T"], Int[Tensor, "3 #B S"]]:
        """Index, order and segment of queries and keys; one row if all are alike."""
        return self._keep("places", self._places)

    @property
    def dense(self) -> Bool[Tensor, "#B 1 T S"] | None:
        """The mask as a tensor, True = may attend; None: everything is allowed."""
        if self.form is Form.OPEN:
            return None
        return self._keep("dense", lambda: allowed(self.mask, *self.places)[:, None])

    @property
    def bounds(self) -> Int[Tensor, "N 3"]:
        """`document_bounds`, in the form DOCUMENTS."""
        return self._keep("bounds", lambda: document_bounds(self.keys.segment))

    @property
    def tiles(self) -> TiledMask:
        """The block structure, and what the pairs of mixed tiles are asked for."""
        kinds = self._keep("kinds", lambda: tile_kinds(self.mask, *self.places))
        return TiledMask(kinds, *self.places, self.mask.number)

    def _keep(self, name: str, compute: Callable[[], T]) -> T:
        # `functools.cached_property` takes a lock, which a compiler cannot trace.
        if name not in self._kept:
            self._kept[name] = compute()
        return self._kept[name]

    def _places(self) -> tuple[Tensor, Tensor]:
        if self.form not in (Form.CAUSAL, Form.DOCUMENTS):
            return places(self.queries), places(self.keys)
        # Through the whole row: a tile with the end of a document and the start of the next is no mixture then.
        segment = self.keys.segment if self.form is Form.DOCUMENTS else self.keys.segment[:1]
        index = torch.arange(self.size[1], device=segment.device).expand_as(segment)
        here = torch.stack([index, index, segment]).int()
        return here, here


def lower(mask: Mask, q: Tokens, k: Tokens, *, past: bool = False) -> LoweredMask:
    """The mask for queries `q` and keys `k`, with what the fastest kernel for its form will read.

    Args:
        mask: Who may attend to whom.
        q: The tokens that ask.
        k: The tokens that answer; `q` itself in self-attention without a cache, those of a memory in cross-attention,
            where documents of the same number meet.
        past: `k` are the tokens of a cache, with those of `q` at the end of each row.
    """
    form = _form(mask, q, k, past)
    query_valid, key_valid = None, None
    if form not in (Form.OPEN, Form.CAUSAL):
        query_valid = None if q.layout is Layout.FULL else q.valid
        # A cache that is read as it lies holds no padding, so there is nothing in it to keep a kernel from reading.
        padded = k.layout is Layout.GENERAL or not (past or k.layout is Layout.FULL)
        key_valid = k.valid if padded else None
    lowered = LoweredMask(mask, q, k, form, query_valid, key_valid)
    # Here rather than on first use: blocks are compiled and checkpointed, and each would compute it again.
    if lowered.at_hand:
        _ = lowered.dense
    elif form is Form.DOCUMENTS and q.segment.device.type == "cpu":
        _ = lowered.bounds
    elif not lowered.plain:
        _ = lowered.tiles
    return lowered


def _form(mask: Mask, q: Tokens, k: Tokens, past: bool) -> Form:
    simple = isinstance(mask, (Full, Causal))
    if simple and k is q and q.layout is not Layout.GENERAL:
        if q.layout is Layout.RAGGED:
            return Form.DOCUMENTS
        return Form.CAUSAL if isinstance(mask, Causal) else Form.OPEN
    if simple and past and q.shape[1] == 1 and k.layout is Layout.FULL:
        return Form.OPEN  # the newest token sees all that came before it
    if isinstance(mask, Full) and q.layout is k.layout is Layout.FULL:
        return Form.OPEN
    return Form.DENSE if q.shape[1] * k.shape[1] <= DENSE_PAIRS else Form.TILES
