"""How labelled items, texts or pictures, become what a classifier reads."""

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np

from qkv.data import Tokenizer
from qkv.data.pictures import PicturesConfig
from qkv.data.reads import Read
from qkv.loading.encoder import patches_of, picture_embedder
from qkv.loading.facts import Facts
from qkv.nn.embedders import EmbedderConfig
from qkv.ops.patches import grid


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

    def length(self, encoded: np.ndarray, embed: EmbedderConfig, context: int | None) -> int:
        """How many tokens `read` gives."""
        return len(self.read(encoded, embed, context).values)

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

    def __init__(self, pictures: PicturesConfig) -> None:
        self.pictures = pictures

    def encoded(self, item: Any) -> np.ndarray:
        return item

    def fitted(self, embed: EmbedderConfig) -> EmbedderConfig:
        return embed.for_pictures(self.pictures.channels)

    def length(self, encoded: np.ndarray, embed: EmbedderConfig, context: int | None) -> int:
        own = picture_embedder(embed)
        return math.prod(grid(encoded.shape, own.patch)) + own.prefix

    def read(self, encoded: np.ndarray, embed: EmbedderConfig, context: int | None) -> Read:
        return patches_of(encoded, self.pictures, embed)

    def save(self, folder: Path, facts: Facts) -> None:
        facts.replace(pictures=self.pictures).save(folder)
