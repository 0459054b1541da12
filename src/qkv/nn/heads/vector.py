"""The stream to vectors: what a model of measurements predicts."""

from typing import ClassVar, final

import torch
from torch import nn

from qkv.config import config
from qkv.errors import ConfigError
from qkv.nn.embedders.embedder import EmbedderConfig
from qkv.nn.embedders.vector import VectorEmbedderConfig
from qkv.nn.heads.head import Head, HeadConfig, check_targets
from qkv.nn.quantised import Table
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens


@final
@config
class VectorHeadConfig(HeadConfig):
    """A linear map to vectors, trained with the squared error.

    Attributes:
        n_out: Width of the output. None: that of the input vectors (prediction of the next one).
    """

    n_out: int | None = None

    gives: ClassVar[str] = "vectors  (T, out)"

    def left_open(self, embed: EmbedderConfig) -> str:
        return embed.left_open if self.n_out is None else ""

    def notes(self, d_model: int, embed: EmbedderConfig) -> list[str]:
        return [f"{d_model:,} → {'…' if self.n_out is None else f'{self.n_out:,}'} numbers"]

    def for_vocabulary(self, n: int) -> HeadConfig:
        raise ConfigError(f"the data are text and model.head is {self.tag()}; use LMHead")

    def for_vectors(self, n: int) -> "VectorHeadConfig":
        if self.n_out not in (None, n):
            raise ConfigError(
                f"the vectors have {n} features and model.head.n_out is {self.n_out}; the model predicts the next "
                "vector, so leave it out"
            )
        return self

    def build(self, d_model: int, embed: EmbedderConfig) -> "VectorHead":
        n_out = embed.n_features if self.n_out is None and isinstance(embed, VectorEmbedderConfig) else self.n_out
        if n_out is None:
            raise ConfigError(f"VectorHead.n_out is not set and {embed.tag()} gives no width; set n_out")
        return VectorHead(d_model, n_out)


@final
class VectorHead(Head):
    """One linear map."""

    def __init__(self, d_model: int, n_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_model, n_out)

    def forward(self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None) -> Float[Tensor, "B T out"]:
        return self.proj(x)

    def loss(
        self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None, targets: Tensor, scale: float
    ) -> Float[Tensor, ""]:
        """Squared error, averaged over the numbers of a vector and summed over the tokens that are no padding."""
        wide = torch.promote_types(x.dtype, torch.float32)
        check_targets(targets, (*x.shape[:2], self.proj.out_features))
        error = (self.proj(x).to(wide) - targets.to(wide)).square().mean(-1)
        return torch.where(tokens.valid, error, 0.0).sum() * scale

    def count(self, targets: Tensor, tokens: Tokens) -> int:
        return int(tokens.valid.sum())
