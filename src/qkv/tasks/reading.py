"""How labelled items, texts or pictures, become what a classifier reads."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np

from qkv.data import Tokenizer
from qkv.data.pictures import AugmentationConfig, PicturesConfig
from qkv.data.reads import Read
from qkv.loading.encoder import patches_of
from qkv.loading.facts import Facts
from qkv.nn.embedders import EmbedderConfig


class Reading(ABC):
    """Base of the ways to read items.

    Attributes:
        item: What one is called.
        example: What a person gives to `qkv classify`.
        longer: What helps where one is longer than the context.
    """

    item: ClassVar[str]
    example: ClassVar[str]
    longer: ClassVar[str]

    @abstractmethod
    def encoded(self, item: Any) -> np.ndarray:
        """An item as numbers, whatever the model: ids, or pixels."""

    @abstractmethod
    def fitted(self, embed: EmbedderConfig) -> EmbedderConfig:
        """The embedder with the sizes that only the data know. Raises `ConfigError` where it does not fit them."""

    @abstractmethod
    def read(self, encoded: np.ndarray, embed: EmbedderConfig, context: int | None) -> Read:
        """What a model with that embedder reads; what can be cut, to at most `context` tokens."""

    def varied(self, encoded: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Another item of the same class, to train on; here the same."""
        return encoded

    @abstractmethod
    def save(self, folder: Path, facts: Facts) -> None:
        """Write what is needed to read others, and what else is known, into the folder of a run."""


@final
class TextReading(Reading):
    """Ids of a tokenizer."""

    item, example, longer = "text", '"TEXT"', "raise context, or set data.cut to cut such texts"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

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
class PictureReading(Reading):
    """Patches, with values normalised by those of the training set."""

    item, example, longer = "picture", "PICTURE.png", "raise context, or give smaller pictures"

    def __init__(self, pictures: PicturesConfig, augment: Sequence[AugmentationConfig] = ()) -> None:
        self.pictures, self.augment = pictures, augment

    def encoded(self, item: Any) -> np.ndarray:
        return item

    def fitted(self, embed: EmbedderConfig) -> EmbedderConfig:
        return embed.for_pictures(self.pictures.channels)

    def varied(self, encoded: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        for each in self.augment:
            encoded = each.apply(encoded, generator)
        return encoded

    def read(self, encoded: np.ndarray, embed: EmbedderConfig, context: int | None) -> Read:
        return patches_of(encoded, self.pictures, embed)

    def save(self, folder: Path, facts: Facts) -> None:
        facts.replace(pictures=self.pictures).save(folder)
