"""The documents of the stream to classes or numbers: one output for each document, or for each token."""

from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import Count, Share, config
from qkv.errors import ConfigError
from qkv.nn.embedders.embedder import EmbedderConfig
from qkv.nn.heads.head import Head, HeadConfig, check_targets
from qkv.nn.heads.objectives import CrossEntropyConfig, ObjectiveConfig
from qkv.nn.heads.transform import TransformConfig
from qkv.nn.pooling import PoolConfig
from qkv.nn.quantised import Table
from qkv.ops.loss import IGNORE
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens


@final
@config
class ClassHeadConfig(HeadConfig):
    """Logits of classes, or numbers: of each document, or of each token.

    Attributes:
        n_classes: How many there are, or how many numbers. None: the head gives the vectors that others classify, and
            has no loss.
        objective: What they are trained for. In a recipe the default becomes what its targets ask for.
        pool: From the tokens of a document to one vector; None: each token has a class of its own.
        transform: What a vector goes through before.
        dropout: Probability that an element of it is dropped in training.
    """

    n_classes: Count | None = None
    objective: ObjectiveConfig = CrossEntropyConfig()
    pool: PoolConfig | None = None
    transform: TransformConfig | None = None
    dropout: Share = 0.0

    gives: ClassVar[str] = "classes or numbers"

    def __post_init__(self) -> None:
        if self.pool is None and not isinstance(self.objective, CrossEntropyConfig):
            raise ConfigError(f"objective={self.objective.tag()} is of whole inputs and pool is None; set pool")

    def notes(self, d_model: int, embed: EmbedderConfig) -> list[str]:
        of = "token" if self.pool is None else "document"
        n = "…" if self.n_classes is None else f"{self.n_classes:,}"
        width = d_model if self.pool is None else self.pool.width(d_model)
        return [f"{width:,} → {n} ({self.objective.gives}), of each {of}"]

    def build(self, d_model: int, embed: EmbedderConfig) -> "ClassHead":
        return ClassHead(self, d_model)


@final
class ClassHead(Head):
    """A pool, a transform, a linear map, each of them by choice."""

    def __init__(self, config: ClassHeadConfig, d_model: int) -> None:
        super().__init__()
        self.pool = None if config.pool is None else config.pool.build(d_model)
        width = d_model if config.pool is None else config.pool.width(d_model)
        self.transform = None if config.transform is None else config.transform.build(width, width)
        self.proj = None if config.n_classes is None else nn.Linear(width, config.n_classes)
        self.dropout, self.objective = config.dropout, config.objective

    def forward(self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None) -> Float[Tensor, "*items out"]:
        """Of each document (N, classes), ordered as in `Documents.of`; without a pool of each token (B, T, classes)."""
        x = x if self.pool is None else self.pool(x, tokens)
        x = x if self.transform is None else self.transform(x)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return x if self.proj is None else self.proj(x)

    def loss(
        self,
        x: Float[Tensor, "B T D"],
        tokens: Tokens,
        table: Table | None,
        targets: Tensor,
        scale: float,
    ) -> Float[Tensor, ""]:
        """That of the objective, summed over the documents, or tokens, that have a target."""
        if self.proj is None:
            raise ConfigError("the head has no classes and so no loss; set n_classes")
        outputs = self(x, tokens, table)
        check_targets(targets, self.objective.shape(outputs.shape, targets))
        wide = torch.promote_types(outputs.dtype, torch.float32)
        return self.objective.loss(outputs.to(wide), self._meant(targets, tokens)) * scale

    def count(self, targets: Tensor, tokens: Tokens) -> int:
        """How many documents, or tokens, have a target."""
        return self.objective.count(self._meant(targets, tokens))

    def _meant(self, targets: Tensor, tokens: Tokens) -> Tensor:
        """The targets without those of padding."""
        return targets if self.pool is not None else torch.where(tokens.valid, targets, IGNORE)
