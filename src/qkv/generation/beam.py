"""Beam search, with any model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch

from qkv.config import Config, config
from qkv.errors import ConfigError
from qkv.generation.sampling import check_finite, log_probabilities
from qkv.models.decoding import Decoding
from qkv.shapes import Float, Tensor

_MOST_BEAMS = 1000  # each is a row of the model's batch
_STRONGEST = 10  # the largest length penalty; n to that power is a number for any n


@final
@config
class BeamConfig(Config):
    """How a search goes.

    A text of n tokens, its end counted, has the score log p / n^length_penalty, as in most libraries. Differs from Wu
    et al. 2016, section 7, whose divisor is ((5 + n) / 6)^α.

    Attributes:
        beams: Unfinished texts that are kept at each step. 1: the likeliest token each time, until that is an end.
        length_penalty: 0: the likeliest text; 1: the likeliest per token; more favours longer ones.
        max_new_tokens: Of a text at most, its end included. One that is cut off there counts like a finished one.
    """

    beams: int = 1
    length_penalty: float = 1.0
    max_new_tokens: int = 100

    def __post_init__(self) -> None:
        if not 1 <= self.beams <= _MOST_BEAMS:
            raise ConfigError(f"beams={self.beams} must be from 1 to {_MOST_BEAMS}")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not abs(self.length_penalty) <= _STRONGEST:
            raise ConfigError(f"length_penalty={self.length_penalty} must be from -{_STRONGEST} to {_STRONGEST}")

    def score(self, log_probability: float, n: int) -> float:
        """Of a text of `n` tokens."""
        return log_probability / n**self.length_penalty

    def bound(self, log_probability: float, n: int) -> float:
        """The best score that a text can reach which has this after `n` tokens: no token adds to it."""
        return max(self.score(log_probability, n), self.score(log_probability, self.max_new_tokens))


@final
@dataclass(frozen=True)
class Hypothesis:
    """A text that a search has found.

    Attributes:
        ids: Its tokens, without the end.
        log_probabilities: Of each of them and, where it ended, of its end, in nats.
        log_probability: Of all of it.
        score: What hypotheses are ordered by.
        ended: Whether it came to its end; else it was cut off.
    """

    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    log_probability: float
    score: float
    ended: bool


@torch.inference_mode()
def beam_search(
    decoding: Decoding, *, end_ids: Sequence[int], search: BeamConfig | Sequence[BeamConfig]
) -> list[list[Hypothesis]]:
    """The best texts of each row, best first; at most `search.beams` of each, none twice.

    Args:
        decoding: From the `start` of any model; a text is what comes after what its row holds.
        end_ids: Tokens that end a text.
        search: How to search, for all rows or for each.

    Raises:
        ConfigError: There is no row.
        QkvError: The logits are not finite.
    """
    searches = [search] * len(decoding.logits) if isinstance(search, BeamConfig) else search
    sentences = [_Sentence(one, frozenset(end_ids)) for one in searches]
    if not sentences:
        raise ConfigError("there is nothing to search for; give at least one row")
    going = list(sentences)
    for n in range(1, max(one.max_new_tokens for one in searches) + 1):
        check_finite(decoding.logits)
        log_p = log_probabilities(decoding.logits).cpu()
        start, rows, ids = 0, [], []
        for sentence in going:
            k = len(sentence.live)
            kept = sentence.step(log_p[start : start + k], n)
            rows += [start + parent for parent, _ in kept]
            ids += [token for _, token in kept]
            start += k
        going = [sentence for sentence in going if sentence.live]
        if not going:
            break
        if rows != list(range(start)):
            decoding.reorder(torch.tensor(rows))
        decoding.advance(torch.tensor(ids))
    return [sentence.done for sentence in sentences]


class _Live(NamedTuple):
    """A text that goes on; as in `Hypothesis`."""

    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    log_probability: float


@final
class _Sentence:
    """The search for one row: unfinished texts, and finished ones, each at most as many as there are beams."""

    def __init__(self, search: BeamConfig, end_ids: frozenset[int]) -> None:
        self._search, self._end_ids = search, end_ids
        self.live = [_Live((), (), 0.0)]
        self.done: list[Hypothesis] = []

    def step(self, log_p: Float[Tensor, "k V"], n: int) -> list[tuple[int, int]]:
        """Extend the texts to `n` tokens; returns for each that goes on its parent's number and its new token."""
        kept, before, self.live = list[tuple[int, int]](), self.live, []
        for rank, (log_probability, parent, token) in enumerate(self._candidates(before, log_p)):
            ended, step = token in self._end_ids, log_p[parent, token].item()
            ids, steps = before[parent].ids, (*before[parent].log_probabilities, step)
            if ended or n == self._search.max_new_tokens:
                if rank < self._search.beams:  # an end that is none of the likeliest is no end
                    self._finish(_Live(ids if ended else (*ids, token), steps, log_probability), n, ended=ended)
            elif len(kept) < self._search.beams:
                kept.append((parent, token))
                self.live.append(_Live((*ids, token), steps, log_probability))
        if self._decided(n):
            self.live, kept = [], []
        return kept

    def _candidates(self, live: list[_Live], log_p: Float[Tensor, "k V"]) -> list[tuple[float, int, int]]:
        """The likeliest extensions, best first: as many that go on as there are beams, whichever of them are ends."""
        total = (log_p.new_tensor([text.log_probability for text in live])[:, None] + log_p).flatten()
        found = total.topk(min(len(total), self._search.beams * (1 + len(self._end_ids))))
        pairs = zip(found.values.tolist(), found.indices.tolist(), strict=True)
        vocab = log_p.shape[1]
        return [(value, place // vocab, place % vocab) for value, place in pairs if value > float("-inf")]

    def _finish(self, text: _Live, n: int, *, ended: bool) -> None:
        if any(ended and other.ended and other.ids == text.ids for other in self.done):
            return  # by another of the ends, a likelier one
        self.done.append(Hypothesis(*text, self._search.score(text.log_probability, n), ended))
        self.done.sort(key=lambda text: -text.score)
        del self.done[self._search.beams :]

    def _decided(self, n: int) -> bool:
        """Whether no unfinished text can still be among the best. One beam ends with its text: it never looks aside."""
        if len(self.done) < self._search.beams:
            return False
        if self._search.beams == 1:
            return True
        worst = self.done[-1].score
        return all(self._search.bound(text.log_probability, n + 1) <= worst for text in self.live)
