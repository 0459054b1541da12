"""How labelled items, texts, pictures or series, become what a classifier reads."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch

from qkv.data import Tokenizer, TokenizerConfig
from qkv.data.pictures import PictureFile, PicturesConfig
from qkv.data.reads import Read
from qkv.errors import ConfigError, FileError
from qkv.loading.encoder import Encoder, patches_of, picture_embedder
from qkv.loading.facts import Facts
from qkv.loading.reader import Reader
from qkv.nn.embedders import EmbedderConfig, VectorEmbedderConfig
from qkv.ops.loss import IGNORE
from qkv.ops.patches import grid
from qkv.shapes import Tensor
from qkv.tasks.task import Start


class Reading(ABC):
    """Base of the ways to read items.

    Attributes:
        item, items: What one is called, and several.
        example: What a person gives to `qkv classify`.
        longer: What helps where one is longer than the context.
    """

    item: ClassVar[str]
    items: ClassVar[str]
    example: ClassVar[str]
    longer: ClassVar[str]

    @classmethod
    @abstractmethod
    def fresh(cls, train: Sequence[Any], held_out: Sequence[Any], tokenizer: TokenizerConfig | None) -> "Reading":
        """How a fresh model reads items. Raises `ConfigError` where the recipe does not say what that takes."""

    @classmethod
    @abstractmethod
    def of(cls, start: Start) -> "Reading":
        """How a trained model reads items. Raises `ConfigError` where it reads others."""

    @abstractmethod
    def encoded(self, item: Any) -> Any:
        """An item as numbers, whatever the model: ids, pixels, or vectors; or what `np.asarray` makes numbers of."""

    @abstractmethod
    def fitted(self, embed: EmbedderConfig) -> EmbedderConfig:
        """The embedder with the sizes that only the data know. Raises `ConfigError` where it does not fit them."""

    @abstractmethod
    def read(self, encoded: np.ndarray, embed: EmbedderConfig, context: int | None) -> Read:
        """What a model with that embedder reads; what can be cut, to at most `context` tokens."""

    def length(self, encoded: Any, embed: EmbedderConfig, context: int | None) -> int:
        """How many tokens `read` gives."""
        return len(self.read(encoded, embed, context).values)

    def placed(self, encoded: Sequence[Any], targets: Any) -> Any:
        """The targets as batches take them; here as they are."""
        return targets

    def save(self, folder: Path, facts: Facts) -> None:
        """Write what is needed to read others, and what else is known, into the folder of a run."""
        facts.save(folder)


@final
class TextReading(Reading):
    """Ids of a tokenizer."""

    item, items, example = "text", "texts", '"TEXT"'
    longer = "raise context, or set data.cut to cut such texts"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def fresh(cls, train: Sequence[Any], held_out: Sequence[Any], tokenizer: TokenizerConfig | None) -> "TextReading":
        if tokenizer is None:
            raise ConfigError("there is no tokenizer; add data.tokenizer, for example BPETokenizer, or a start")
        return cls(tokenizer.train([*train, *held_out] if tokenizer.reads_validation else list(train)))

    @classmethod
    def of(cls, start: Start) -> "TextReading":
        reader = start.opened
        if not isinstance(reader, Reader) or reader.tokenizer is None:
            raise ConfigError(f"start.path={start.path} reads no text; start from an encoder or a language model")
        return cls(reader.tokenizer)

    def encoded(self, item: Any) -> np.ndarray:
        (framed,) = self.tokenizer.encode_framed([item])
        return np.array(framed.ids, dtype=np.int64)

    def fitted(self, embed: EmbedderConfig) -> EmbedderConfig:
        return embed.for_vocabulary(self.tokenizer.vocab_size)

    def read(self, encoded: np.ndarray, embed: EmbedderConfig, context: int | None) -> Read:
        if context is None or len(encoded) <= context:
            return Read(encoded)
        end = len(self.tokenizer.frame[1])
        return Read(np.concatenate([encoded[: context - end], encoded[len(encoded) - end :]]))

    def save(self, folder: Path, facts: Facts) -> None:
        self.tokenizer.save(folder)
        facts.save(folder)


@final
class WordReading(Reading):
    """Ids of a tokenizer, and which word each begins."""

    item, items, example = "text", "texts", '"TEXT"'
    longer = "raise context, or give shorter texts"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def fresh(cls, train: Sequence[Any], held_out: Sequence[Any], tokenizer: TokenizerConfig | None) -> "WordReading":
        texts, others = ([" ".join(words) for words in part] for part in (train, held_out))
        return cls(TextReading.fresh(texts, others, tokenizer).tokenizer)

    @classmethod
    def of(cls, start: Start) -> "WordReading":
        return cls(TextReading.of(start).tokenizer)

    def encoded(self, item: Any) -> np.ndarray:
        framed, firsts = self.tokenizer.encode_words(item)
        begins = np.zeros(len(framed.ids), dtype=np.int64)  # counted from 1
        for number, place in enumerate(firsts, 1):
            if place is not None:
                begins[place] = number
        return np.stack([np.array(framed.ids, dtype=np.int64), begins], axis=1)

    def placed(self, encoded: Sequence[np.ndarray], targets: Sequence[Tensor]) -> list[Tensor]:
        """For each token that begins a word the class of the word, for others -100."""
        nothing = torch.tensor([IGNORE])
        return [torch.cat([nothing, own])[each[:, 1]] for each, own in zip(encoded, targets, strict=True)]

    def fitted(self, embed: EmbedderConfig) -> EmbedderConfig:
        return embed.for_vocabulary(self.tokenizer.vocab_size)

    def read(self, encoded: np.ndarray, embed: EmbedderConfig, context: int | None) -> Read:
        return Read(encoded[:, 0])

    def save(self, folder: Path, facts: Facts) -> None:
        self.tokenizer.save(folder)
        facts.save(folder)


@final
class PictureReading(Reading):
    """Patches, with values normalised by those of the training set."""

    item, items, example = "picture", "pictures", "PICTURE.png"
    longer = "raise context, or give smaller pictures"

    def __init__(self, pictures: PicturesConfig) -> None:
        self.pictures = pictures

    @classmethod
    def fresh(
        cls, train: Sequence[Any], held_out: Sequence[Any], tokenizer: TokenizerConfig | None
    ) -> "PictureReading":
        return cls(PicturesConfig.of(train))

    @classmethod
    def of(cls, start: Start) -> "PictureReading":
        reader = start.opened
        if not isinstance(reader, Encoder) or reader.facts.pictures is None:
            raise ConfigError(
                f"start.path={start.path} reads no pictures; start from a model that does, or leave it out"
            )
        return cls(reader.facts.pictures)

    def encoded(self, item: Any) -> Any:
        if isinstance(item, PictureFile):
            return replace(item, model=self.pictures)
        return self.pictures.resized(item)

    def fitted(self, embed: EmbedderConfig) -> EmbedderConfig:
        return embed.for_pictures(self.pictures.channels)

    def length(self, encoded: Any, embed: EmbedderConfig, context: int | None) -> int:
        own = picture_embedder(embed)
        return math.prod(grid(encoded.shape, own.patch)) + own.prefix

    def read(self, encoded: np.ndarray, embed: EmbedderConfig, context: int | None) -> Read:
        return patches_of(encoded, self.pictures, embed)

    def save(self, folder: Path, facts: Facts) -> None:
        facts.replace(pictures=self.pictures).save(folder)


@final
class VectorReading(Reading):
    """Vectors as they are."""

    item, items, example = "series", "series", "SERIES.npy"
    longer = "raise context, or give shorter series"

    def __init__(self, n_features: int) -> None:
        self.n_features = n_features

    @classmethod
    def fresh(cls, train: Sequence[Any], held_out: Sequence[Any], tokenizer: TokenizerConfig | None) -> "VectorReading":
        return cls(train[0].shape[1])

    @classmethod
    def of(cls, start: Start) -> "VectorReading":
        embed = start.opened.config.embed if isinstance(start.opened, Reader) else None
        if not isinstance(embed, VectorEmbedderConfig) or embed.n_features is None:
            raise ConfigError(f"start.path={start.path} reads no vectors; start from a model that does")
        return cls(embed.n_features)

    def encoded(self, item: Any) -> np.ndarray:
        if item.shape[1] != self.n_features:
            raise FileError(f"a series has {item.shape[1]} features and the model reads {self.n_features}")
        return item

    def fitted(self, embed: EmbedderConfig) -> EmbedderConfig:
        return embed.for_vectors(self.n_features)

    def read(self, encoded: np.ndarray, embed: EmbedderConfig, context: int | None) -> Read:
        return Read(torch.from_numpy(encoded))
