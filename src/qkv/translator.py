"""A model of pairs with its tokenizers: texts in, texts out."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch

from qkv.checkpoints import Store, check_depth, check_fit
from qkv.checkpoints.keras_transly import VOCABULARIES, WEIGHTS, TranslyModel, Unit, load_transly
from qkv.config import expand_home, read_yaml
from qkv.data import PairTokenizer, Tokenizer, unit_tokenizer
from qkv.data.pairs import SIDES
from qkv.errors import ConfigError, FileError
from qkv.generation import BeamConfig, Hypothesis, beam_search
from qkv.inspect import Alignment
from qkv.models.pairs import Pair, PairModel, PairModelConfig
from qkv.shapes import Int, Tensor
from qkv.tokens import Tokens

RECIPE = "recipe.yaml"
SOURCE, TARGET = SIDES


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
class Translator:
    """A model of pairs with its tokenizers.

    Attributes:
        model: In evaluation mode.
        source: Of what is read.
        target: Of what is written.
        begin_id: What every target begins with.
        end_id: What ends it.
        longest: Tokens of a source at most; None: any.
        longest_target: Tokens of a target at most, its end included; None: as of a source.
    """

    model: PairModel
    source: Tokenizer
    target: Tokenizer
    begin_id: int
    end_id: int
    longest: int | None = None
    longest_target: int | None = None

    def translate(self, text: str, *, search: BeamConfig | None = None) -> str:
        """The best translation.

        Raises:
            ConfigError: The text is blank, too long, or holds what the tokenizer does not know.
        """
        if not text.strip():
            raise ConfigError("the text is blank; give one to translate")
        return self.translations([text], search=search)[0][0].text

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
                found[i] = [self._read(text) for text in texts_of_row]
        return [found[i] for i in range(len(sources))]

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
        names = (*_names(self.source, source), *[""] * (weights.shape[-1] - len(source)))
        written = (*_names(self.target, target), "⏎")
        return Alignment(names, written, weights, self.target.decode(target) if translation is None else translation)

    def _bounded(self, search: BeamConfig) -> BeamConfig:
        limit = self.longest_target or self.longest
        return search if limit is None else replace(search, max_new_tokens=min(limit, search.max_new_tokens))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of sources, without the white space around them, as pairs are read; of a blank one there are none.

        Raises:
            ConfigError: As in `translations`; texts are numbered from 1.
        """
        sources = self._encoded([text.strip() for text in texts])
        for number, ids in enumerate(sources, start=1):
            if self.longest is not None and len(ids) > self.longest:
                raise ConfigError(
                    f"text {number} has {len(ids)} tokens and the model takes at most {self.longest}; cut it into parts"
                )
        return sources

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return self.source.encode_batch(texts)
        except ConfigError:
            for number, text in enumerate(texts, start=1):
                try:
                    self.source.encode(text)
                except ConfigError as error:
                    raise ConfigError(f"text {number}: {error}" if len(texts) > 1 else str(error)) from None
            raise

    def _search(self, sources: list[list[int]], search: BeamConfig) -> list[list[Hypothesis]]:
        with torch.inference_mode():
            decoding = self.model.start(*self._batch(sources), capacity=search.max_new_tokens)
        return beam_search(decoding, [self.begin_id] * len(sources), end_ids=[self.end_id], search=search)

    def _batch(self, sources: list[list[int]]) -> tuple[Int[Tensor, "B S"], Tokens]:
        device = next(self.model.parameters()).device
        lengths = [len(ids) for ids in sources]
        ids = torch.zeros(len(sources), max(lengths), dtype=torch.long)
        for row, source in enumerate(sources):
            ids[row, : len(source)] = torch.tensor(source)
        return ids.to(device), Tokens.padded(lengths, device=device)

    def _read(self, text: Hypothesis) -> Translation:
        return Translation(self.target.decode(text.ids), text.score, text.log_probability, text.ended)


def _names(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token as text; a character that several tokens make stands at the last of them."""
    names = [tokenizer.decode([token]) for token in ids]
    if not any("\ufffd" in name for name in names):
        return names
    stream = tokenizer.stream()
    return [stream.push(token) for token in ids]


def is_translator(path: str | Path) -> bool:
    """Whether a folder, or a file in it, is a model of pairs, as far as the names in it say."""
    folder = _folder(path)
    return (folder / WEIGHTS).is_file() or (folder / TARGET / "tokenizer.json").is_file()


def load_translator(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Translator:
    """A translator from a folder: a run of `qkv train` on pairs, or a trained model of the package transly.

    Args:
        path: The folder, or transly's `model.h5` in it.
        device: Where the weights go.
        dtype: Type of the weights; None: that of the file.

    Raises:
        FileError: The folder is neither, has no checkpoint yet, or does not fit together.
    """
    folder = _folder(path)
    if (folder / WEIGHTS).is_file():
        loaded = _of_transly(load_transly(folder))
    elif (folder / TARGET / "tokenizer.json").is_file():
        loaded = _of_run(folder)
    elif not folder.exists():
        raise FileError(f"{folder}: no such folder; give a run on pairs, or a model of the package transly")
    elif any((folder / name).is_file() for name in (RECIPE, "config.json", "model.yaml")) or folder.is_file():
        raise FileError(f"{folder}: is no translator; a language model writes with qkv generate")
    else:
        raise FileError(
            f"{folder}: is no translator: it has neither {WEIGHTS} with {VOCABULARIES} (transly) nor {TARGET}/"
            "tokenizer.json (a run on pairs); give a folder with one"
        )
    loaded.model.to(device=device, dtype=dtype)
    return loaded


def _folder(path: str | Path) -> Path:
    place = expand_home(path)
    return place.parent if place.name == WEIGHTS and place.is_file() else place


def _of_transly(found: TranslyModel) -> Translator:
    def tokenizer(vocabulary: dict[str, int], unit: Unit) -> Tokenizer:
        names = {token: name for name, token in vocabulary.items()}
        return unit_tokenizer(vocabulary, words=unit == "word", special=(names[found.end], names[found.begin]))

    source, target = tokenizer(found.source, found.units[0]), tokenizer(found.target, found.units[1])
    return Translator(found.model, source, target, found.begin, found.end, found.model.config.longest, found.longest)


def _of_run(folder: Path) -> Translator:
    config = _config(folder / RECIPE)
    checkpoint = Store(folder / "checkpoints").latest()
    if checkpoint is None:
        raise FileError(f"{folder}: the run has no checkpoint yet; go on with it, or wait for its first one")
    for warning in checkpoint.warnings:
        warnings.warn(warning, stacklevel=3)
    state = checkpoint.tensors("model")
    check_depth(config.depth, len(state), source=str(folder / RECIPE))
    try:
        with torch.device("meta"):
            model = config.build()
    except (ConfigError, RuntimeError, TypeError) as error:
        raise FileError(f"{folder / RECIPE}: the model cannot be built: {str(error).splitlines()[0]}") from None
    check_fit(state, model.state_dict(), source=str(checkpoint.path))
    model.load_state_dict(state, assign=True)
    tokenizers = PairTokenizer.load(folder)
    source, target = tokenizers.source, tokenizers.target
    for tokenizer, n in zip((source, target), config.vocabularies, strict=True):
        if n is not None and tokenizer.vocab_size > n:
            raise FileError(
                f"{folder}: a tokenizer has {tokenizer.vocab_size} tokens and the model {n}; put the tokenizers there "
                "that belong to the model"
            )
    end = target.end_of_text
    if end is None:
        raise FileError(f"{folder / TARGET}: the tokenizer has no end-of-text token; put the run's own there")
    return Translator(model.requires_grad_().eval(), source, target, end, end, config.longest)


def _config(path: Path) -> PairModelConfig:
    try:
        data = read_yaml(path)
        if not isinstance(data, dict) or "model" not in data:
            raise ConfigError("it has no 'model'")
        return PairModelConfig.from_dict(data["model"], path="model")
    except ConfigError as error:
        raise FileError(f"{path}: not the recipe of a run on pairs: {error}") from None
