"""A model of pairs with its tokenizers: texts in, texts out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import torch

from qkv.config import checked
from qkv.data import PairTokenizer, Tokenizer
from qkv.data.pairs import SIDES
from qkv.errors import ConfigError, FileError
from qkv.generation import BeamConfig, Hypothesis, beam_search
from qkv.inspect import Alignment, Inspection, draw_alignment
from qkv.loading.facts import Facts
from qkv.loading.ready import Ready, check_vocabulary
from qkv.models.pairs import Pair, PairModel
from qkv.shapes import Int, Tensor
from qkv.tokens import Tokens, pad_ids


@final
@dataclass(frozen=True)
class Translation:
    """One of the texts that a search found.

    Attributes:
        text: The text.
        score: What the search orders by; see `BeamConfig`.
        log_probability: In nats, of all its tokens and its end.
        ended: Whether it came to its end, or was cut off.
    """

    text: str
    score: float
    log_probability: float
    ended: bool


@final
@dataclass(frozen=True)
class Translator(Ready):
    """A model of pairs with its tokenizers.

    Attributes:
        model: In evaluation mode.
        source: Of what is read.
        target: Of what is written.
        facts: What is known of it besides; the first of `stop_ids` ends a target.
    """

    what = "a model of pairs"
    verbs = "qkv translate, eval or inspect"

    model: PairModel
    source: Tokenizer
    target: Tokenizer
    facts: Facts

    @classmethod
    def read(cls, model: PairModel, folder: Path, facts: Facts | None = None) -> "Translator":
        """The model with the tokenizers of a folder; None for the facts: those of a model that qkv trained.

        Raises:
            FileError: A tokenizer is damaged.
        """
        words = PairTokenizer.load(folder)
        facts = Facts.of_pairs(words.target, model.config.longest) if facts is None else facts
        return cls(model, words.source, words.target, facts)

    def check(self, source: Path) -> None:
        for tokenizer, n in zip((self.source, self.target), self.model.config.vocabularies, strict=True):
            check_vocabulary(tokenizer, n, source)
        if self.facts.begin_id is None or not self.facts.stop_ids:
            raise FileError(
                f"{source}: the tokenizer of the targets has no end-of-text token; put the model's own there"
            )

    def files(self) -> dict[str, bytes]:
        sides = zip(SIDES, (self.source, self.target), strict=True)
        return {f"{side}/{name}": data for side, words in sides for name, data in words.files().items()}

    @property
    def begin_id(self) -> int:
        """What every target begins with."""
        assert self.facts.begin_id is not None
        return self.facts.begin_id

    @property
    def end_id(self) -> int:
        """What ends it."""
        return self.facts.stop_ids[0]

    @checked
    def translate(self, text: str, *, search: BeamConfig | None = None) -> str:
        """The best translation.

        Raises:
            ConfigError: The text is blank, too long, or holds what the tokenizer does not know.
        """
        if not text.strip():
            raise ConfigError("the text is blank; give one to translate")
        return self.translations([text], search=search)[0][0].text

    @checked
    def translations(
        self, texts: Sequence[str], *, search: BeamConfig | None = None, batch_size: int = 64
    ) -> list[list[Translation]]:
        """Of each text what the search found, best first. Of one that is blank it is the empty text.

        Args:
            texts: The sources. They have no influence on each other.
            search: How to search; None: one beam.
            batch_size: Texts that are read at once.

        Raises:
            ConfigError: A text is too long, or holds what the tokenizer does not know; `batch_size` is below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        search = self._bounded(search or BeamConfig())
        sources = self.encode(texts)
        order = sorted((i for i, ids in enumerate(sources) if ids), key=lambda i: len(sources[i]))
        blank = Translation("", 0.0, 0.0, ended=True)
        found = {i: [blank] for i, ids in enumerate(sources) if not ids}
        for at in range(0, len(order), batch_size):
            some = order[at : at + batch_size]
            for i, texts_of_row in zip(some, self._search([sources[i] for i in some], search), strict=True):
                found[i] = [
                    Translation(self.target.decode(one.ids), one.score, one.log_probability, one.ended)
                    for one in texts_of_row
                ]
        return [found[i] for i in range(len(sources))]

    @checked
    def align(self, text: str, translation: str | None = None) -> Alignment:
        """Where the translation of a text looks; None for the translation: the model's own.

        Raises:
            ConfigError: The model has no attention, or as in `translate`.
        """
        (source,) = self.encode([text])
        if not source:
            raise ConfigError("the text is blank; give one to translate")
        if translation is None:
            target = self._search([source], self._bounded(BeamConfig()))[0][0].ids
        else:
            target = self.target.encode(translation)
        ids, tokens = self._batch([source])
        inputs = Pair(ids, tokens, torch.tensor([[self.begin_id, *target]], device=ids.device))
        weights = self.model.align(inputs)[0].cpu()
        names = (*self.source.names(source), *[""] * (weights.shape[-1] - len(source)))
        written = (*self.target.names(target), "⏎")
        return Alignment(names, written, weights, self.target.decode(target) if translation is None else translation)

    def inspect(self, given: str, *, translation: str | None = None, **how: Any) -> Inspection:
        if how:
            raise ConfigError(f"{next(iter(how))} is for models that read, and this one translates; leave it out")
        found = self.align(given, translation)
        return Inspection("alignment", f"{given} → {found.translation}", partial(draw_alignment, found))

    def _bounded(self, search: BeamConfig) -> BeamConfig:
        limit = self.facts.longest_target or self.facts.longest
        return search if limit is None else replace(search, max_new_tokens=min(limit, search.max_new_tokens))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of sources, without the white space around them, as pairs are read; of a blank one there are none.

        Raises:
            ConfigError: As in `translations`; texts are numbered from 1.
        """
        texts, longest = [text.strip() for text in texts], self.facts.longest
        try:
            sources = self.source.encode_batch(texts)
        except ConfigError:
            for number, text in enumerate(texts, start=1):
                try:
                    self.source.encode(text)
                except ConfigError as error:
                    raise ConfigError(f"text {number}: {error}" if len(texts) > 1 else str(error)) from None
            raise
        for number, ids in enumerate(sources, start=1):
            if longest is not None and len(ids) > longest:
                raise ConfigError(
                    f"text {number} has {len(ids)} tokens and the model takes at most {longest}; cut it into parts"
                )
        return sources

    def _search(self, sources: list[list[int]], search: BeamConfig) -> list[list[Hypothesis]]:
        begin = [[self.begin_id]] * len(sources)
        decoding = self.model.start(*self._batch(sources), begin, capacity=search.max_new_tokens)
        return beam_search(decoding, end_ids=[self.end_id], search=search)

    def _batch(self, sources: list[list[int]]) -> tuple[Int[Tensor, "B S"], Tokens]:
        return pad_ids(sources, next(self.model.parameters()).device)
