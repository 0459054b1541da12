"""Pictures: each patch is a token."""

from dataclasses import replace
from typing import ClassVar, final

import torch
from torch import nn

from qkv.config import Count, config
from qkv.errors import ConfigError
from qkv.nn.embedders.embedder import Embedder, EmbedderConfig
from qkv.nn.positions.tables import LearnedGrid
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens


@final
@config
class PatchEmbedderConfig(EmbedderConfig):
    """A linear map from the values of a patch to the stream (Dosovitskiy et al. 2021, section 3.1).

    The inputs are patches, one for each token, as `qkv.ops.patches.patchify` makes them, so that pictures of unequal
    size stand side by side like texts; `Tokens.pictures` says where.

    Attributes:
        patch: Pixels of a side.
        channels: Values of a pixel. None: in a recipe, those of the data.
        bias: Whether the map has a bias.
    """

    patch: Count
    channels: Count | None = None
    bias: bool = True

    takes: ClassVar[str] = "patches  (T, values)"

    @property
    def left_open(self) -> str:
        return "set by the data" if self.channels is None else ""

    def notes(self, d_model: int) -> list[str]:
        channels = "…" if self.channels is None else self.channels
        return [f"patches of {self.patch} x {self.patch} pixels, {channels} channels → {self.width or d_model:,}"]

    def for_pictures(self, channels: int) -> "PatchEmbedderConfig":
        if self.channels not in (None, channels):
            raise ConfigError(
                f"the pictures have {channels} channels and model.embed.channels is {self.channels}; leave it out, or "
                f"set it to {channels}"
            )
        return self.replace(channels=channels)

    def closed(self) -> "PatchEmbedderConfig":
        """Three colours."""
        return self if self.channels is not None else self.replace(channels=3)


@final
class PatchEmbedder(Embedder, config=PatchEmbedderConfig):
    """One linear map."""

    def __init__(self, config: PatchEmbedderConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        if config.channels is None:
            raise ConfigError("embed.channels=None; set it to the values of a pixel, such as 3")
        self.proj = nn.Linear(config.channels * config.patch**2, self.width, bias=config.bias)

    def embed(self, inputs: Float[Tensor, "B T values"]) -> Float[Tensor, "B T D"]:
        """Raises `ConfigError` where the patches have another number of values."""
        if inputs.dim() != 3 or inputs.shape[-1] != self.proj.in_features:
            raise ConfigError(
                f"the patches are {tuple(inputs.shape)} and must be (B, T, {self.proj.in_features}); make them with "
                "qkv.ops.patches.patchify"
            )
        return self.proj(inputs)

    def example(self, batch: int, length: int, generator: torch.Generator) -> Float[Tensor, "B T values"]:
        return torch.randn(batch, length, self.proj.in_features, generator=generator)

    def example_tokens(self, tokens: Tokens) -> Tokens:
        """Each document is a picture whose last row may be shorter."""
        columns = self.position.columns if isinstance(self.position, LearnedGrid) else 3
        return replace(tokens, coords=torch.stack([tokens.index // columns, tokens.index % columns], -1))
