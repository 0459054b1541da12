"""What turns raw input into the stream."""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import nn

from qkv.config import Config, Configured, config
from qkv.errors import ConfigError
from qkv.nn.positions import LearnedPositionsConfig, PositionTableConfig
from qkv.nn.quantised import Table
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens


@config
class EmbedderConfig(Config, ABC):
    """Base of the configs of embedders.

    Attributes:
        position: Table of positions that is added; None where attention knows them (rotary), or nothing does.
        dropout: Probability that an element of the embeddings is dropped in training.
    """

    position: PositionTableConfig | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must be at least 0 and below 1")

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest document that the table of positions admits; None: any."""
        return self.position.length if isinstance(self.position, LearnedPositionsConfig) else None

    def closed(self) -> "EmbedderConfig":
        """The same with a size for each that only data would set; here there is none."""
        return self

    def build(self, d_model: int) -> "Embedder":
        """The embedder for a stream of width `d_model`."""
        return self._build(d_model)


class Embedder(Configured, nn.Module, ABC):
    """Base of the embedders: the input's own vectors, plus positions, after dropout."""

    def __init__(self, config: EmbedderConfig, d_model: int) -> None:
        super().__init__()
        self.position = config.position.build(d_model) if config.position else None
        self.dropout = config.dropout

    def forward(self, inputs: Tensor, tokens: Tokens) -> Float[Tensor, "B T D"]:
        """The stream that the first block sees."""
        x = self.embed(inputs)
        if self.position is not None:
            x = x + self.position(tokens, x.dtype)
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    @abstractmethod
    def embed(self, inputs: Tensor) -> Float[Tensor, "B T D"]:
        """A vector for each input, without position."""

    @property
    @abstractmethod
    def table(self) -> Table | None:
        """The vectors of all tokens, for a head that shares them; None where the input is no vocabulary."""
