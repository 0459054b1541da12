"""What a mask comes to for the tokens at hand: the least that a kernel has to be told."""

from dataclasses import dataclass

import torch

from qkv.masks import Causal, Full, Mask, Rule, places
from qkv.shapes import Bool, Int, Tensor
from qkv.tokens import Layout, Tokens

_CAUSAL, _FULL = Causal(), Full()  # made here: a compiler cannot trace the making of a config


@dataclass(frozen=True)
class LoweredMask:
    """What a mask comes to for the tokens at hand: the least that a kernel has to be told.

    Attributes:
        causal: Query i sees keys up to i, inside its document. With none of the others set, every row is one document
            and T = S (or nothing is masked at all).
        documents: Document id of each token, 0 for padding, when every document is one unbroken run of its row.
        allow: The mask as a tensor, True = may attend, when nothing simpler will do and the square is small.
        query_valid: With `rule`: False at padded queries; None where there are none.
        key_valid: The same for keys.
        rule: What `allow` is, or would be, made from.
    """

    causal: bool = False
    documents: Int[Tensor, "B T"] | None = None
    allow: Bool[Tensor, "B 1 T S"] | None = None
    query_valid: Bool[Tensor, "B T"] | None = None
    key_valid: Bool[Tensor, "B S"] | None = None
    rule: Rule | None = None

    @property
    def plain(self) -> bool:
        """Whether there is nothing to say but `causal`."""
        return self.documents is None and self.allow is None and self.rule is None

    @property
    def size(self) -> tuple[int, int] | None:
        """For how many queries and keys it is; None: for any."""
        if self.rule is not None:
            return self.rule.q.shape[-1], self.rule.k.shape[-1]
        if self.allow is not None:
            return self.allow.shape[-2], self.allow.shape[-1]
        return None if self.documents is None else (self.documents.shape[1], self.documents.shape[1])

    def dense(self, n_queries: int, n_keys: int, device: torch.device) -> Bool[Tensor, "#B 1 T S"] | None:
        """The mask as a tensor, whatever form it has; None where everything is allowed."""
        if self.allow is not None:
            return self.allow
        if self.plain and not self.causal:
            return None
        return self.as_rule(n_queries, n_keys, device).dense()

    def as_rule(self, n_queries: int, n_keys: int, device: torch.device) -> Rule:
        """The mask as a rule, unless it was given as nothing but a tensor."""
        if self.rule is not None:
            return self.rule
        assert self.allow is None
        k = _standing(n_keys, self.documents, device)
        if n_queries == n_keys:
            return Rule(_CAUSAL if self.causal else _FULL, k, k)
        # Nothing is masked; but a bias asks where they stand. Queries are the last tokens, as everywhere.
        q = _standing(n_queries, None, device)
        q[:2] += n_keys - n_queries
        return Rule(_FULL, q, k)

    def padding(self) -> tuple[Bool[Tensor, "B T"] | None, Bool[Tensor, "B S"] | None]:
        """False at padded queries, and at padded keys; None where there are none."""
        if self.documents is None:
            return self.query_valid, self.key_valid
        valid = self.documents > 0
        return valid, valid


def _standing(n: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Index, order and segment of rows whose order rises."""
    order = torch.arange(n, device=device)[None]
    segment = torch.ones_like(order) if documents is None else documents
    return torch.stack([order.expand_as(segment), order.expand_as(segment), segment])


DENSE_PAIRS = 2**18
"""A mask of so many queries times keys in a row is made once per forward pass, as a tensor, for all layers."""


def lower(mask: Mask, q: Tokens, k: Tokens, *, past: bool = False) -> LoweredMask:
    """The least that must be said about `mask` for queries `q` and keys `k`.

    Args:
        mask: Who may attend to whom.
        q: The tokens that ask.
        k: The tokens that answer; `q` itself in self-attention without a cache, those of a memory in cross-attention,
            where documents meet that have the same number.
        past: `k` are the tokens of a cache with those of `q` at the end of each row.
    """
    simple = isinstance(mask, (Full, Causal))
    if simple and not past and k is q and q.layout is not Layout.GENERAL:
        documents = None if q.layout is Layout.FULL else q.segment
        return LoweredMask(causal=isinstance(mask, Causal), documents=documents)
    if simple and past and q.shape[1] == 1 and k.layout is Layout.FULL:
        return LoweredMask()  # the newest token sees all that came before it
    if isinstance(mask, Full) and q.layout is k.layout is Layout.FULL:
        return LoweredMask()
    rule = Rule(mask, places(q), places(k))
    small = q.shape[1] * k.shape[1] <= DENSE_PAIRS
    return LoweredMask(
        allow=rule.dense() if small else None,
        query_valid=None if q.layout is Layout.FULL else q.valid,
        # A cache that is read as it lies holds no padding, so there is nothing in it to keep a kernel from reading.
        key_valid=k.valid if k.layout is Layout.GENERAL or not (past or k.layout is Layout.FULL) else None,
        rule=rule,
    )
