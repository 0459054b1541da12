"""Pictures: each patch is a token."""

from dataclasses import replace
from typing import Annotated, ClassVar, final

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import Count, config, must
from qkv.errors import ConfigError
from qkv.nn.embedders.embedder import Embedder, EmbedderConfig, of_kinds
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
        prefix: Trained vectors that stand before the patches of each picture, without a position: a class token, one
            for distillation (Touvron et al. 2021, section 4), registers (Darcet et al. 2024). `Tokens.pictures(grids,
            prefix=…)` makes room for them, and what stands there in the inputs is not looked at.
    """

    patch: Count
    channels: Count | None = None
    bias: bool = True
    prefix: Annotated[int, must("not be negative", lambda n: n >= 0)] = 0

    def __post_init__(self) -> None:
        if self.prefix and self.types:
            raise ConfigError(f"prefix={self.prefix} tokens are of kinds of their own and types={self.types}; leave it")

    @property
    def max_length(self) -> int | None:
        longest = super().max_length
        return None if longest is None else self.prefix + longest

    takes: ClassVar[str] = "patches  (T, values)"

    @property
    def left_open(self) -> str:
        return "set by the data" if self.channels is None else ""

    def notes(self, d_model: int) -> list[str]:
        channels = "…" if self.channels is None else self.channels
        before = [f"{self.prefix} trained before them"] if self.prefix else []
        patches = f"patches of {self.patch} x {self.patch} pixels, {channels} channels → {self.width or d_model:,}"
        return [patches, *before]

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
    """One linear map, and the vectors that stand before the patches."""

    def __init__(self, config: PatchEmbedderConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        if config.channels is None:
            raise ConfigError("embed.channels=None; set it to the values of a pixel, such as 3")
        self.proj = nn.Linear(config.channels * config.patch**2, self.width, bias=config.bias)
        self.prefix = nn.Parameter(torch.empty(config.prefix, self.width)) if config.prefix else None

    def embed(self, inputs: Float[Tensor, "B T values"]) -> Float[Tensor, "B T D"]:
        """Raises `ConfigError` where the patches have another number of values."""
        if inputs.dim() != 3 or inputs.shape[-1] != self.proj.in_features:
            raise ConfigError(
                f"the patches are {tuple(inputs.shape)} and must be (B, T, {self.proj.in_features}); make them with "
                "qkv.ops.patches.patchify"
            )
        return self.proj(inputs)

    def by_kind(self, x: Float[Tensor, "B T D"], tokens: Tokens) -> Float[Tensor, "B T D"]:
        """Those of kind 1 and above are trained ones."""
        if self.prefix is None:
            return super().by_kind(x, tokens)
        if tokens.types is None:
            n = len(self.prefix)
            raise ConfigError(
                f"the embedder has prefix={n} and no token is one of these; give Tokens.pictures(grids, prefix={n})"
            )
        trained = of_kinds(tokens.types, F.pad(self.prefix, (0, 0, 1, 0))).to(x.dtype)
        return torch.where((tokens.types > 0)[..., None], trained, x)

    def flops(self) -> int:
        return super().flops() - (0 if self.prefix is None else 2 * self.prefix.numel())

    def example(self, batch: int, length: int, generator: torch.Generator) -> Float[Tensor, "B T values"]:
        return torch.randn(batch, length, self.proj.in_features, generator=generator)

    def example_tokens(self, tokens: Tokens) -> Tokens:
        """Each document is a picture whose last row may be shorter."""
        columns = self.position.columns if isinstance(self.position, LearnedGrid) else 3
        n = 0 if self.prefix is None else len(self.prefix)
        at, before = tokens.index - n, tokens.index < n
        coords = torch.stack([at // columns, at % columns], -1).masked_fill(before[..., None], -1)
        tokens = replace(super().example_tokens(tokens), coords=coords)
        return tokens.with_types((tokens.index + 1) * before) if n else tokens
