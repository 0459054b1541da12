"""A model of pairs with its tokenizers: texts in, texts out."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch

from qkv.checkpoints import Store, check_fit
from qkv.checkpoints.keras_transly import VOCABULARIES, WEIGHTS, TranslyModel, Unit, load_transly
from qkv.config import read_yaml
from qkv.data import Tokenizer, unit_tokenizer
from qkv.errors import ConfigError, FileError
from qkv.generation import BeamConfig, Hypothesis, beam_search
from qkv.inspect import Alignment
from qkv.models.pairs import Pair, PairModel, PairModelConfig
from qkv.shapes import Int, Tensor
from qkv.tokens import Tokens

RECIPE, SOURCE, TARGET = "recipe.yaml", "source", "target"
"""What a run of pairs has in its folder: the recipe, and a folder for each tokenizer."""


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
        longest: Tokens of a source or a target at most, its end included; None: any.
    """

    model: PairModel
    source: Tokenizer
    target: Tokenizer
    begin_id: int
    end_id: int
    longest: int | None = None

    def translate(self, text: str, *, search: BeamConfig | None = None) -> str:
        """The best translation.

        Raises:
            ConfigError: The text is empty, too long, or holds what the tokenizer does not know.
        """
        return self.translations([text], search=search)[0][0].text

    def translations(
        self, texts: Sequence[str], *, search: BeamConfig | None = None, batch_size: int = 64
    ) -> list[list[Translation]]:
        """Of each text what the search found, best first.

        Args:
            texts: The sources. They have no influence on each other.
            search: How to search; None: one beam.
            batch_size: Texts that are read at once.

        Raises:
            ConfigError: As in `translate`.
        """
        search = self._bounded(search or BeamConfig())
        sources = self._sources(texts)
        order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
        found: dict[int, list[Translation]] = {}
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
        translation = self.translate(text) if translation is None else translation
        (source,) = self._sources([text])
        target = self.target.encode(translation)
        ids, tokens = self._batch([source])
        inputs = Pair(ids, tokens, torch.tensor([[self.begin_id, *target]], device=ids.device))
        weights = self.model.align(inputs)[0].cpu()
        names = tuple(self.source.decode([token]) for token in source)
        names += ("",) * (weights.shape[-1] - len(names))
        return Alignment(names, (*(self.target.decode([token]) for token in target), "⏎"), weights)

    def _bounded(self, search: BeamConfig) -> BeamConfig:
        n = search.max_new_tokens if self.longest is None else min(self.longest, search.max_new_tokens)
        return replace(search, max_new_tokens=n)

    def _sources(self, texts: Sequence[str]) -> list[list[int]]:
        sources = self.source.encode_batch(texts)
        for number, ids in enumerate(sources, start=1):
            if not ids:
                raise ConfigError(f"text {number} is empty; give a text to translate")
            if self.longest is not None and len(ids) > self.longest:
                raise ConfigError(
                    f"text {number} has {len(ids)} tokens and the model takes at most {self.longest}; cut it into parts"
                )
        return sources

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
    else:
        raise FileError(
            f"{folder}: is no translator: it has neither {WEIGHTS} with {VOCABULARIES} (transly) nor {TARGET}/"
            "tokenizer.json (a run on pairs); give a folder with one"
        )
    loaded.model.to(device=device, dtype=dtype)
    return loaded


def _folder(path: str | Path) -> Path:
    place = Path(path).expanduser()
    return place.parent if place.name == WEIGHTS and place.is_file() else place


def _of_transly(found: TranslyModel) -> Translator:
    def tokenizer(vocabulary: dict[str, int], unit: Unit) -> Tokenizer:
        names = {token: name for name, token in vocabulary.items()}
        return unit_tokenizer(vocabulary, words=unit == "word", special=(names[found.end], names[found.begin]))

    source, target = tokenizer(found.source, found.units[0]), tokenizer(found.target, found.units[1])
    return Translator(found.model, source, target, found.begin, found.end, found.longest)


def _of_run(folder: Path) -> Translator:
    config = _config(folder / RECIPE)
    checkpoint = Store(folder / "checkpoints").latest()
    if checkpoint is None:
        raise FileError(f"{folder}: the run has no checkpoint yet; go on with it, or wait for its first one")
    for warning in checkpoint.warnings:
        warnings.warn(warning, stacklevel=3)
    state = checkpoint.tensors("model")
    depth = _depth(config.to_dict())
    if depth > len(state):  # before anything of that size is built
        raise FileError(
            f"{folder / RECIPE}: asks for {depth} layers and there are {len(state)} tensors of weights; mend 'model'"
        )
    try:
        with torch.device("meta"):
            model = config.build()
    except (ConfigError, RuntimeError, TypeError) as error:
        raise FileError(f"{folder / RECIPE}: the model cannot be built: {str(error).splitlines()[0]}") from None
    check_fit(state, model.state_dict(), source=str(checkpoint.path))
    model.load_state_dict(state, assign=True)
    source, target = Tokenizer.load(folder / SOURCE), Tokenizer.load(folder / TARGET)
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


def _depth(config: object) -> int:
    """The most layers or rounds of blocks that a part of a config asks for, by the names that configs have for them."""
    if isinstance(config, list):
        return max(map(_depth, config), default=0)
    if not isinstance(config, dict):
        return 0
    own = [value for key, value in config.items() if key in ("n", "layers") and type(value) is int]
    return max([*own, *map(_depth, config.values())], default=0)
