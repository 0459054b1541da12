"""What makes outputs of the stream, and the loss that trains it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from qkv.config import Config, config
from qkv.errors import ConfigError
from qkv.nn.embedders.embedder import EmbedderConfig
from qkv.nn.part import Part
from qkv.nn.quantised import Table
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens


class Head(Part, ABC):
    """Base of the heads.

    `table` is the embedder's own table of vectors, for a head that shares it: there is then one parameter and one name,
    so nothing that copies, shards or saves parameters can part them.
    """

    def flops(self, table: Table | None) -> int:
        """Floating-point operations for one token."""
        return self.matrix_flops()

    @abstractmethod
    def forward(self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None) -> Float[Tensor, "..."]:
        """The outputs: for each token, or of a head that pools for each document."""

    @abstractmethod
    def loss(
        self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None, targets: Tensor, scale: float
    ) -> Float[Tensor, ""]:
        """`scale` times the loss summed over the tokens that have a target."""

    @abstractmethod
    def count(self, targets: Tensor, tokens: Tokens) -> int:
        """How many tokens have a target."""


def check_targets(targets: Tensor, shape: Sequence[int]) -> None:
    """Raise `ConfigError` where targets are not of the shape of what they are the targets of."""
    if targets.shape != torch.Size(shape):
        raise ConfigError(
            f"targets are {tuple(targets.shape)} and the outputs {tuple(shape)}; give each token its target"
        )


@config
class HeadConfig(Config, ABC):
    """Base of the configs of heads."""

    gives: ClassVar[str] = "outputs  (T, …)"
    """The output in a drawing."""

    def left_open(self, embed: EmbedderConfig) -> str:
        """What sets a size that it leaves open: by default what sets that of the embedder."""
        return embed.left_open

    def notes(self, d_model: int, embed: EmbedderConfig) -> list[str]:
        """What a drawing says of it."""
        return [self.describe()]

    def for_vocabulary(self, n: int) -> "HeadConfig":
        """The same for targets that are ids of a tokenizer with `n` tokens; `ConfigError` if it has no use for ids."""
        return self

    def for_vectors(self, n: int) -> "HeadConfig":
        """The same for targets that are vectors of `n` numbers; `ConfigError` if its own are others."""
        return self

    @abstractmethod
    def build(self, d_model: int, embed: EmbedderConfig) -> Head:
        """The head of a model of width `d_model` with this embedder; `ConfigError` if they do not fit."""
