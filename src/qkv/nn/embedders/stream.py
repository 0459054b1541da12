"""Vectors that are the stream already: another part of the model made them."""

from typing import final

from qkv.config import config
from qkv.nn.embedders.embedder import Embedder, EmbedderConfig
from qkv.shapes import Float, Tensor


@final
@config
class StreamEmbedderConfig(EmbedderConfig):
    """Nothing but the position and the dropout that every embedder may add."""


@final
class StreamEmbedder(Embedder, config=StreamEmbedderConfig):
    """Passes its input on."""

    def embed(self, inputs: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The input."""
        return inputs

    @property
    def table(self) -> None:
        """There is no vocabulary."""
        return None
