"""Texts that are written side by side and may join and leave at any time, each with its own sampling and ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import final

import torch

from qkv.generation.sampling import SamplingConfig, check_finite, log_probabilities, next_ids, row_generators
from qkv.models.decoding import Decoding
from qkv.shapes import Float, Int, Tensor


class Finish(Enum):
    """Why a row has ended."""

    STOP = "a stop id was drawn"
    LENGTH = "max_new_tokens were generated"
    CONTEXT = "the model's context is full"


@final
@dataclass(eq=False)
class Row:
    """A text to write.

    Attributes:
        prompt: Token ids that it begins with, at least one.
        sampling: How its tokens are drawn.
        max_new_tokens: Of it at most.
        stop_ids: Tokens that end it; they are not part of it.
        context: Tokens that it can have, prompt included; None: no limit.
        stream: Number of its stream of random numbers: with one seed and one number, two rows draw alike.
        text: All of it so far, prompt included.
        log_probabilities: Of each token drawn, a stop id included, in nats, where the engine was asked for them.
        finish: Why it has ended; None: it has not.
        generator: Of its random numbers; given by the engine.
    """

    prompt: Sequence[int]
    sampling: SamplingConfig
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    context: int | None = None
    stream: int = 0
    text: list[int] = field(init=False)
    log_probabilities: list[float] = field(init=False, default_factory=list)
    finish: Finish | None = field(init=False, default=None)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.text = list(self.prompt)

    @property
    def longest(self) -> int:
        """Tokens that the text can have in the end."""
        n = len(self.prompt) + self.max_new_tokens
        return n if self.context is None else min(n, self.context)

    def append(self, token: int) -> None:
        """Add a token, or end the text."""
        if token in self.stop_ids:
            self.finish = Finish.STOP
            return
        self.text.append(token)
        if len(self.text) == self.context:
            self.finish = Finish.CONTEXT
        elif len(self.text) == self.longest:
            self.finish = Finish.LENGTH


@final
class Engine:
    """Writes texts side by side (continuous batching). Each text is what it would be alone.

    Attributes:
        rows: Texts that have not ended.

    Args:
        start: Reads prompts: the `start` of a model, with what else that needs.
        rows: The first texts.
        log_probabilities: Whether to note those of the tokens drawn.
    """

    def __init__(
        self,
        start: Callable[[list[list[int]]], Decoding],
        rows: Sequence[Row] = (),
        *,
        log_probabilities: bool = False,
    ) -> None:
        self.rows = list(rows)
        self._start, self._scored = start, log_probabilities
        self._decoding: Decoding | None = None
        self._read: list[Row] = []  # in the order of the decoding's rows
        self._drawn = torch.zeros(0, dtype=torch.long)  # the last token of each, which the model has not read yet

    def join(self, row: Row) -> None:
        """Write this text too, from the next step on."""
        self.rows.append(row)

    def leave(self, row: Row) -> None:
        """Give up a text before its end."""
        self.rows.remove(row)

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Draw one more token for each text, of which there must be one. Returns the texts that it was drawn for.

        Raises:
            QkvError: The logits are not finite.
        """
        logits = self._advance()
        check_finite(logits)
        self._drawn = self._draw(logits)
        if self._scored:
            scores = log_probabilities(logits).gather(1, self._drawn[:, None])[:, 0]
            for row, score in zip(self._read, scores.tolist(), strict=True):
                row.log_probabilities.append(score)
        for row, token in zip(self._read, self._drawn.tolist(), strict=True):
            row.append(token)
        self.rows = [row for row in self.rows if row.finish is None]
        return self._read

    def _advance(self) -> Float[Tensor, "R V"]:
        """The logits of what follows each text, once those that have ended are gone and new ones are read."""
        stay = [place for place, row in enumerate(self._read) if row in self.rows]
        new = [row for row in self.rows if row not in self._read]
        joined = self._start([row.text for row in new]) if new else None
        if self._decoding is not None and stay:
            if len(stay) < len(self._read):
                self._decoding.leave(set(range(len(self._read))).difference(stay))
                self._drawn = self._drawn[stay]
            self._decoding.advance(self._drawn)
            if joined is not None:
                self._decoding.join(joined)
        else:
            self._decoding = joined
        assert self._decoding is not None
        for row in new:
            (row.generator,) = row_generators(row.sampling.seed, [row.stream], self._decoding.logits.device)
        self._read = [*(self._read[place] for place in stay), *new]
        return self._decoding.logits

    def _draw(self, logits: Float[Tensor, "R V"]) -> Int[Tensor, " R"]:
        """A token for each row; rows that are sampled alike are drawn together."""
        groups: dict[SamplingConfig, list[int]] = {}
        for place, row in enumerate(self._read):
            groups.setdefault(row.sampling, []).append(place)
        drawn = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        for sampling, places in groups.items():
            rows = [self._read[place] for place in places]
            history, generators = [row.text for row in rows], [row.generator for row in rows]
            some = logits if len(groups) == 1 else logits[places]
            drawn[places] = next_ids(some, history, sampling, generators)
        return drawn
