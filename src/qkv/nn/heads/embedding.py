"""The documents of the stream to one vector each, which are compared with others."""

from typing import ClassVar, final

from torch import nn

from qkv.config import Count, config
from qkv.errors import ConfigError
from qkv.nn.embedders.embedder import EmbedderConfig
from qkv.nn.heads.head import Head, HeadConfig
from qkv.nn.pooling import MeanPoolConfig, PoolConfig
from qkv.nn.quantised import Table
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens


@final
@config
class EmbeddingHeadConfig(HeadConfig):
    """A vector of each document. It has no loss of its own: a model that compares vectors has one.

    Attributes:
        pool: From the tokens of a document to one vector.
        width: Of the vector that a linear map makes of that; None: there is no map.
        bias: Whether the map has a bias.
    """

    pool: PoolConfig = MeanPoolConfig()
    width: Count | None = None
    bias: bool = False

    gives: ClassVar[str] = "vectors  (documents, width)"

    def notes(self, d_model: int, embed: EmbedderConfig) -> list[str]:
        return [f"{self.pool.describe()} → {self.width or d_model:,} numbers of each document"]

    def build(self, d_model: int, embed: EmbedderConfig) -> "EmbeddingHead":
        return EmbeddingHead(self, d_model)


@final
class EmbeddingHead(Head):
    """A pool and a linear map."""

    def __init__(self, config: EmbeddingHeadConfig, d_model: int) -> None:
        super().__init__()
        self.pool = config.pool.build(d_model)
        self.proj = None if config.width is None else nn.Linear(d_model, config.width, bias=config.bias)

    def forward(self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None) -> Float[Tensor, "N E"]:
        """A vector of each document, ordered as in `Documents.of`."""
        x = self.pool(x, tokens)
        return x if self.proj is None else self.proj(x)

    def loss(
        self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None, targets: Tensor, scale: float
    ) -> Float[Tensor, ""]:
        """There is none: raises `ConfigError`."""
        raise ConfigError("the head gives vectors and has no loss; train it in TwoTowers, or give a ClassHead")

    def count(self, targets: Tensor, tokens: Tokens) -> int:
        """One for each document."""
        return len(targets)
