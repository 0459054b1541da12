"""The user's own vectors: any sequence of measurements, features or frames."""

from dataclasses import replace
from typing import final

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

    def closed(self) -> "VectorEmbedderConfig":
        """See `EmbedderConfig`."""
        return replace(self, n_features=self.n_features or 8)


@final
class VectorEmbedder(Embedder, config=VectorEmbedderConfig):
    """One linear map."""

    def __init__(self, config: VectorEmbedderConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        if config.n_features is None or config.n_features < 1:
            raise ConfigError(f"embed.n_features={config.n_features}; set it to the width of your vectors")
        self.proj = nn.Linear(config.n_features, d_model, bias=config.bias)

    def embed(self, inputs: Float[Tensor, "B T features"]) -> Float[Tensor, "B T D"]:
        """Project each vector.

        Raises:
            ConfigError: The vectors have another width.
        """
        if inputs.shape[-1] != self.proj.in_features:
            raise ConfigError(
                f"the vectors have {inputs.shape[-1]} features and the model takes {self.proj.in_features}"
            )
        return self.proj(inputs)

    @property
    def table(self) -> None:
        """There is no vocabulary."""
        return None
