"""The laws: each says which two computations must agree, and where."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch

from qkv.laws.subject import Subject
from qkv.shapes import Tensor
from qkv.tokens import Tokens

Select = Callable[[Tensor], Tensor]

SIDES: tuple[Literal["right"], Literal["left"]] = ("right", "left")

LENGTH = 19
"""Tokens of a row: odd, prime, and longer than the windows of small models."""


class Run(NamedTuple):
    """A computation, and the part of what comes out that a law speaks of.

    Attributes:
        compute: Runs the subject.
        at: Takes outputs (B, T, …) to that part.
    """

    compute: Callable[[], Tensor]
    at: Select


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


def _everything(x: Tensor) -> Tensor:
    return x


def _length(subject: Subject) -> int:
    return LENGTH if subject.longest is None else max(2, min(LENGTH, subject.longest))


def _twice(subject: Subject) -> Iterator[Pair]:
    x = subject.draw(2, _length(subject), seed=0)
    run = Run(lambda: subject.run(x), _everything)
    yield Pair(run, run)


def _rows(subject: Subject) -> Iterator[Pair]:
    x = subject.draw(3, _length(subject), seed=1)
    for row in range(3):
        alone = Run(lambda row=row: subject.run(x[row : row + 1]), _everything)
        yield Pair(alone, Run(lambda: subject.run(x), lambda y, row=row: y[row : row + 1]))


def _future(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    x, other = subject.draw(2, n, seed=2), subject.draw(2, n, seed=3)
    for cut in sorted({1, n // 2, n - 1}):
        changed = torch.cat([x[:, :cut], other[:, cut:]], 1)
        before = lambda y, cut=cut: y[:, :cut]  # noqa: E731
        yield Pair(Run(lambda: subject.run(x), before), Run(lambda changed=changed: subject.run(changed), before))


def _shorter(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    x = subject.draw(2, n, seed=4)
    for cut in sorted({1, n // 2, n - 1}):
        alone = Run(lambda cut=cut: subject.run(x[:, :cut]), _everything)
        yield Pair(alone, Run(lambda: subject.run(x), lambda y, cut=cut: y[:, :cut]))


def _padding(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    lengths, x = [n, n // 2, 1], subject.draw(3, n, seed=5)
    for side in SIDES:
        for row, m in enumerate(lengths):
            place = slice(0, m) if side == "right" else slice(n - m, n)
            alone = Run(lambda row=row, place=place: subject.run(x[row : row + 1, place]), _everything)
            part = lambda y, row=row, place=place: y[row : row + 1, place]  # noqa: E731
            yield Pair(alone, Run(partial(subject.padded, x, lengths, side), part))


def _poison(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    lengths, x = [n, n // 2, 1], subject.draw(3, n, seed=6)
    for side in SIDES:
        valid = Tokens.padded(lengths, n, side=side).valid
        poisoned = subject.poisoned(x, valid)
        real = lambda y, valid=valid: y[valid]  # noqa: E731
        yield Pair(
            Run(partial(subject.padded, x, lengths, side), real),
            Run(partial(subject.padded, poisoned, lengths, side), real),
        )


def _packing(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    first, second = n // 3, n - n // 3
    x = subject.draw(1, n, seed=7)
    for place in (slice(0, first), slice(first, n)) if first else ():
        alone = Run(lambda place=place: subject.run(x[:, place]), _everything)
        part = lambda y, place=place: y[:, place]  # noqa: E731
        yield Pair(alone, Run(lambda: subject.packed(x, [[first, second]]), part))


def _neighbours(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    first = max(1, n // 3)
    x, other = subject.draw(1, n, seed=8), subject.draw(1, n, seed=9)
    for place in (slice(0, first), slice(first, n)):
        changed = other.clone()
        changed[:, place] = x[:, place]
        part = lambda y, place=place: y[:, place]  # noqa: E731
        yield Pair(
            Run(lambda: subject.packed(x, [[first, n - first]]), part),
            Run(lambda changed=changed: subject.packed(changed, [[first, n - first]]), part),
        )


def _cache(subject: Subject) -> Iterator[Pair]:
    n = _length(subject)
    x = subject.draw(2, n, seed=10)
    for cuts in (range(1, n + 1), sorted({n // 2, n}), sorted({1, 1 + n // 2, n})):
        whole = Run(lambda: subject.run(x), _everything)
        yield Pair(whole, Run(lambda cuts=tuple(cuts): subject.steps(x, cuts), _everything))


def _alignment(subject: Subject) -> Iterator[Pair]:
    """Sums over all places and over the tokens among them, both 1."""
    n = _length(subject)
    lengths, x = [n, n // 2, 1], subject.draw(3, n, seed=12)
    valid = Tokens.padded(lengths, n).valid

    def sums(*, tokens: bool) -> Tensor:
        weights, there = subject.aligned(x, lengths)
        return (weights * there[:, None] if tokens else weights).sum(-1, keepdim=True)

    real = lambda y: y[valid]  # noqa: E731
    ones = Run(lambda: torch.ones_like(sums(tokens=False)), real)
    yield Pair(ones, Run(lambda: sums(tokens=False), real))
    yield Pair(ones, Run(lambda: sums(tokens=True), real))


def _dropout(subject: Subject) -> Iterator[Pair]:
    x = subject.draw(2, _length(subject), seed=11)
    run = Run(lambda: subject.run(x), _everything)
    yield Pair(run, run, training=True)


LAWS: tuple[Law, ...] = (
    Law("evaluation", "Two evaluations of the same input are the same.", frozenset(), _twice),
    Law("training mode", "Without dropout, training mode changes nothing.", frozenset(), _dropout),
    Law("rows", "A row in a batch is the row alone.", frozenset(), _rows),
    Law("future", "What comes later changes nothing before it.", frozenset({"causal"}), _future),
    Law("beginning", "The beginning of a text is that text alone.", frozenset({"causal"}), _shorter),
    Law("padding", "A padded row, left or right, is the row alone.", frozenset({"padded"}), _padding),
    Law("poison", "What lies in the padding changes nothing.", frozenset({"padded"}), _poison),
    Law("packing", "A document beside others is the document alone.", frozenset({"packed"}), _packing),
    Law("neighbours", "What is in a document changes nothing in the next.", frozenset({"packed"}), _neighbours),
    Law("cache", "Reading in pieces with a cache is reading at once.", frozenset({"steps"}), _cache),
    Law("alignment", "Weights over a source sum to 1; padding has none.", frozenset({"aligned"}), _alignment),
)
