"""The user's own vectors: any sequence of measurements, features or frames."""

from typing import ClassVar, final

import torch
from torch import nn

from qkv.config import config
from qkv.errors import ConfigError
from qkv.nn.embedders.embedder import Embedder, EmbedderConfig
from qkv.shapes import Float, Tensor


@final
@config
class VectorEmbedderConfig(EmbedderConfig):
    """A linear map from vectors of `n_features` numbers to the stream.

    Attributes:
        n_features: Width of the input. None: in a recipe, that of the data.
        bias: Whether the map has a bias.
    """

    n_features: int | None = None
    bias: bool = True

    takes: ClassVar[str] = "vectors  (T, features)"

    @property
    def left_open(self) -> str:
        return "set by the data" if self.n_features is None else ""

    def notes(self, d_model: int) -> list[str]:
        return [f"{'…' if self.n_features is None else f'{self.n_features:,}'} features → {d_model:,}"]

    def for_vectors(self, n: int) -> "VectorEmbedderConfig":
        if self.n_features not in (None, n):
            raise ConfigError(
                f"the vectors have {n} features and model.embed.n_features is {self.n_features}; leave it out, or "
                f"set it to {n}"
            )
        return self.replace(n_features=n)

    def closed(self) -> "VectorEmbedderConfig":
        """Eight numbers."""
        return self if self.n_features is not None else self.replace(n_features=8)


@final
class VectorEmbedder(Embedder, config=VectorEmbedderConfig):
    """One linear map."""

    def __init__(self, config: VectorEmbedderConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        if config.n_features is None or config.n_features < 1:
            raise ConfigError(f"embed.n_features={config.n_features}; set it to the width of your vectors")
        self.proj = nn.Linear(config.n_features, self.width, bias=config.bias)

    def embed(self, inputs: Float[Tensor, "B T features"]) -> Float[Tensor, "B T D"]:
        if inputs.dim() != 3:
            raise ConfigError(f"vectors are (B, T, F) and these {tuple(inputs.shape)}; give one text as x[None]")
        if inputs.shape[-1] != self.proj.in_features:
            raise ConfigError(
                f"the vectors have {inputs.shape[-1]} features and the model takes {self.proj.in_features}"
            )
        return self.proj(inputs)

    def example(self, batch: int, length: int, generator: torch.Generator) -> Float[Tensor, "B T features"]:
        return torch.randn(batch, length, self.proj.in_features, generator=generator)
