"""The laws: each says which two computations must agree, and where."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from qkv.laws.subject import Side, Subject
from qkv.shapes import Tensor
from qkv.tokens import Tokens

SIDES: tuple[Side, Side] = ("right", "left")

LENGTH = 19
"""Tokens of a row: odd, prime, and longer than the windows of small models."""


class Run(NamedTuple):
    """A computation, and the part of what comes out that a law speaks of.

    Attributes:
        compute: Runs the subject.
        where: The index of that part in outputs (B, T, …).
    """

    compute: Callable[[], Tensor]
    where: Any = ...

    def part(self, outputs: Tensor) -> Tensor:
        """That part of outputs (B, T, …)."""
        return outputs[self.where]


class Pair(NamedTuple):
    """Two computations that must agree.

    Attributes:
        a: How it should be.
        b: How it is under what must not matter.
        training: Whether the module is in training mode for `b`, with every dropout set to 0.
    """

    a: Run
    b: Run
    training: bool = False


@dataclass(frozen=True)
class Law:
    """A law.

    Attributes:
        name: What it is called.
        says: It in a sentence.
        needs: What the subject must be able to do, of `Subject.can`; "causal" where tokens must not see ahead.
        pairs: The computations that must agree.
    """

    name: str
    says: str
    needs: frozenset[str]
    pairs: Callable[[Subject], Iterator[Pair]]

    def applies(self, subject: Subject) -> bool:
        """Whether the subject can be asked."""
        return self.needs <= (subject.can | ({"causal"} if subject.causal else frozenset()))


def _length(subject: Subject) -> int:
    return LENGTH if subject.longest is None else max(2, min(LENGTH, subject.longest))


def _beginnings(n: int) -> list[int]:
    return sorted({1, n // 2, n - 1})


def _ragged(n: int) -> list[int]:
    return [n, n // 2, 1]


def _twice(subject: Subject, *, training: bool = False) -> Iterator[Pair]:
    run = Run(partial(subject.run, subject.draw(2, _length(subject), seed=11 if training else 0)))
    yield Pair(run, run, training)


def _rows(subject: Subject) -> Iterator[Pair]:
    x = subject.draw(3, _length(subject), seed=1)
    for row in range(3):
        one = slice(row, row + 1)
        yield Pair(Run(partial(subject.run, x[one])), Run(partial(subject.run, x), one))


def _future(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    x, other = subject.draw(2, n, seed=2), subject.draw(2, n, seed=3)
    for cut in _beginnings(n):
        changed, before = torch.cat([x[:, :cut], other[:, cut:]], 1), (slice(None), slice(cut))
        yield Pair(Run(partial(subject.run, x), before), Run(partial(subject.run, changed), before))


def _shorter(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    x = subject.draw(2, n, seed=4)
    for cut in _beginnings(n):
        yield Pair(Run(partial(subject.run, x[:, :cut])), Run(partial(subject.run, x), (slice(None), slice(cut))))


def _padding(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    lengths, x = _ragged(n), subject.draw(3, n, seed=5)
    for side in SIDES:
        for row, m in enumerate(lengths):
            where = slice(row, row + 1), slice(0, m) if side == "right" else slice(n - m, n)
            yield Pair(Run(partial(subject.run, x[where])), Run(partial(subject.padded, x, lengths, side), where))


def _poison(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    lengths, x = _ragged(n), subject.draw(3, n, seed=6)
    for side in SIDES:
        valid = Tokens.padded(lengths, n, side=side).valid
        clean, poisoned = (partial(subject.padded, y, lengths, side) for y in (x, subject.poisoned(x, valid)))
        yield Pair(Run(clean, valid), Run(poisoned, valid))


def _packing(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    first = n // 3
    x = subject.draw(1, n, seed=7)
    packed = partial(subject.packed, x, [[first, n - first]])
    for place in (slice(0, first), slice(first, n)) if first else ():
        yield Pair(Run(partial(subject.run, x[:, place])), Run(packed, (slice(None), place)))


def _neighbours(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    first = max(1, n // 3)
    x, other = subject.draw(1, n, seed=8), subject.draw(1, n, seed=9)
    for place in (slice(0, first), slice(first, n)):
        changed = other.clone()
        changed[:, place] = x[:, place]
        ours, theirs = (Run(partial(subject.packed, y, [[first, n - first]]), (0, place)) for y in (x, changed))
        yield Pair(ours, theirs)


def _order(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    x, order = subject.draw(2, n, seed=13), torch.randperm(n, generator=torch.Generator().manual_seed(13))
    yield Pair(Run(partial(subject.run, x), (slice(None), order)), Run(partial(subject.permuted, x, order)))


def _pooling(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    lengths, x = _ragged(n), subject.draw(3, n, seed=14)
    for side in SIDES:
        for row, m in enumerate(lengths):
            where = slice(row, row + 1), slice(0, m) if side == "right" else slice(n - m, n)
            alone = partial(subject.pooled, x[where], Tokens.full(1, m))
            yield Pair(Run(alone), Run(partial(subject.pooled, x, Tokens.padded(lengths, n, side=side)), where[0]))


def _pooling_together(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    sizes = [n // 2, n - n // 2]
    x = subject.draw(1, n, seed=15)
    together = partial(subject.pooled, x, Tokens.packed([sizes]))
    for i, part in enumerate(x.split(sizes, 1)):
        yield Pair(Run(partial(subject.pooled, part, Tokens.full(1, sizes[i]))), Run(together, slice(i, i + 1)))


def _cache(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    x = subject.draw(2, n, seed=10)
    for cuts in (range(1, n + 1), sorted({n // 2, n}), sorted({1, 1 + n // 2, n})):
        yield Pair(Run(partial(subject.run, x)), Run(partial(subject.steps, x, tuple(cuts))))


def _alignment(subject: Subject) -> Iterator[Pair]:
    """Sums over all places and over the tokens among them, both 1."""
    n = _length(subject)
    lengths, x = _ragged(n), subject.draw(3, n, seed=12)
    valid = Tokens.padded(lengths, n).valid

    def sums(*, tokens: bool) -> Tensor:
        weights, there = subject.aligned(x, lengths)
        return (weights * there[:, None] if tokens else weights).sum(-1, keepdim=True)

    ones = Run(lambda: torch.ones_like(sums(tokens=False)), valid)
    for tokens in (False, True):
        yield Pair(ones, Run(partial(sums, tokens=tokens), valid))


LAWS: tuple[Law, ...] = (
    Law("evaluation", "Two evaluations of the same input are the same.", frozenset(), _twice),
    Law(
        "training mode", "Without dropout, training mode changes nothing.", frozenset(), partial(_twice, training=True)
    ),
    Law("rows", "A row in a batch is the row alone.", frozenset(), _rows),
    Law("future", "What comes later changes nothing before it.", frozenset({"causal"}), _future),
    Law("beginning", "The beginning of a text is that text alone.", frozenset({"causal"}), _shorter),
    Law("padding", "A padded row, left or right, is the row alone.", frozenset({"padded"}), _padding),
    Law("poison", "What lies in the padding changes nothing.", frozenset({"padded"}), _poison),
    Law("packing", "A document beside others is the document alone.", frozenset({"packed"}), _packing),
    Law("neighbours", "What is in a document changes nothing in the next.", frozenset({"packed"}), _neighbours),
    Law("order", "Tokens stored in another order, with their places, are the same.", frozenset({"permuted"}), _order),
    Law("pooling", "What a head makes of a padded document is that of it alone.", frozenset({"pooled"}), _pooling),
    Law(
        "pooling together",
        "What a head makes of a document beside others is that of it alone.",
        frozenset({"pooled together"}),
        _pooling_together,
    ),
    Law("cache", "Reading in pieces with a cache is reading at once.", frozenset({"steps"}), _cache),
    Law("alignment", "Weights over a source sum to 1; padding has none.", frozenset({"aligned"}), _alignment),
)
