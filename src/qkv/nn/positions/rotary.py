"""Rotary position embedding, as data: of texts by one coordinate, of pictures by row and column."""

import math
from abc import ABC, abstractmethod
from typing import Annotated, final

import torch

from qkv.config import Config, config, must
from qkv.errors import ConfigError
from qkv.nn.positions.rope_scaling import RoPEScalingConfig
from qkv.nn.positions.tables import cells_of
from qkv.ops.rotary import RotaryLayout, Rotation, angles, frequencies, rotation
from qkv.shapes import Shaped, Tensor
from qkv.tokens import Layout, Tokens

Theta = Annotated[float, must("be above 1; it is usually 100 or more", lambda theta: theta > 1)]


@config
class RotaryConfig(Config, ABC):
    """Base of the configs of rotary embeddings, which turn the coordinates of queries and keys in pairs."""

    @property
    def by_length(self) -> bool:
        """Whether a token's rotation may depend on the length of its text."""
        return False

    def keeps(self, before: int, after: int) -> bool:
        """Whether the rotations of a text of `before` tokens are the same when it has grown to `after`."""
        return True

    @abstractmethod
    def width(self, head_dim: int) -> int:
        """How many coordinates of a head are rotated.

        Raises:
            ConfigError: They do not make pairs.
        """

    @abstractmethod
    def rotation(self, tokens: Tokens, width: int, dtype: torch.dtype) -> Rotation:
        """The angles of these tokens, for heads of `width` rotated coordinates.

        Raises:
            ConfigError: The tokens have another number of coordinates each.
        """


@final
@config
class RoPEConfig(RotaryConfig):
    """Rotary position embedding of queries and keys (Su et al. 2021, RoFormer, section 3.2).

    Attributes:
        theta: Base of the frequencies θ^(-2i / K).
        layout: Which coordinates make a pair: "half" (i and i + K/2: GPT-NeoX, Hugging Face) or "interleaved" (2i and
            2i + 1: the paper, Meta's code).
        scaling: How it is stretched to longer texts, if it is.
        fraction: Share of a head's coordinates that are rotated, the first ones (GPT-NeoX); the rest know no position.
    """

    theta: Theta = 10_000.0
    layout: RotaryLayout = "half"
    scaling: RoPEScalingConfig | None = None
    fraction: Annotated[float, must("be above 0 and at most 1", lambda share: 0 < share <= 1)] = 1.0

    def describe(self) -> str:
        scaling = f" ({self.scaling.tag().removesuffix('Scaling')})" if self.scaling else ""
        share = f" on {self.fraction:.0%}" if self.fraction < 1 else ""
        return f"rotary θ={self.theta:,.0f}{share}{scaling}"

    @property
    def by_length(self) -> bool:
        return self.scaling is not None and self.scaling.by_length

    def keeps(self, before: int, after: int) -> bool:
        return self.scaling is None or self.scaling.keeps(before, after)

    def width(self, head_dim: int) -> int:
        width = int(head_dim * self.fraction)
        if width % 2 or not width:
            share = "" if self.fraction == 1 else f", of which {width} turn,"
            raise ConfigError(f"rotary embedding pairs coordinates and head_dim={head_dim}{share} is odd; make it even")
        if self.scaling is not None:
            self.scaling.check_width(width)
        return width

    def rotation(self, tokens: Tokens, width: int, dtype: torch.dtype) -> Rotation:
        if (n := tokens.coords.shape[-1]) != 1:
            raise ConfigError(f"RoPE turns by 1 coordinate and the tokens have {n} each; give `Tokens.coords` one")
        # Rows of one full sequence each may start at different places in decoding, but without a cache they are alike.
        position = tokens.coords[..., 0]
        alike = tokens.layout is Layout.FULL and position.stride(0) == 0
        position = position[:1] if alike else position
        wide = torch.promote_types(dtype, torch.float32)
        if self.scaling is None:
            plain = frequencies(self.theta, width, position.device)
            return rotation(angles(position, plain), self.layout, dtype=wide)
        # To know the lengths of several texts a GPU is waited for; most scalings ask for their device alone.
        lengths = tokens.lengths if self.scaling.by_length else tokens.index[:, :1]
        scaled = self.scaling.frequencies(self.theta, width, lengths[:1] if alike else lengths)
        return rotation(angles(position, scaled), self.layout, magnitude=self.scaling.magnitude, dtype=wide)


@config
class GridRoPEConfig(RotaryConfig, ABC):
    """Base of the rotary embeddings of pictures: the first half of the pairs turn by the row, the others by the column.

    Tokens without a place, such as a class token, are not turned. Pair i of each axis has the frequency θ^(-4i / K).

    Attributes:
        theta: Base of the frequencies.
        layout: Which coordinates make a pair, as in `RoPEConfig`.
    """

    theta: Theta = 10_000.0
    layout: RotaryLayout = "half"

    def describe(self) -> str:
        return f"rotary θ={self.theta:,.0f} by row and column"

    def width(self, head_dim: int) -> int:
        if head_dim % 4:
            raise ConfigError(
                f"rotary embedding turns as many pairs by row as by column and head_dim={head_dim}; make it a multiple "
                "of 4"
            )
        return head_dim

    @abstractmethod
    def places(self, tokens: Tokens) -> Shaped[Tensor, "B T 2"]:
        """By which angle the first pair of each axis turns, in radians; of tokens without a place, anything."""

    def rotation(self, tokens: Tokens, width: int, dtype: torch.dtype) -> Rotation:
        _, none = cells_of(tokens)
        at = self.places(tokens).masked_fill(none[..., None], 0)
        angle = angles(at, frequencies(self.theta, width // 2, at.device)).flatten(-2)
        return rotation(angle, self.layout, dtype=torch.promote_types(dtype, torch.float32))


@final
@config
class AxialRoPEConfig(GridRoPEConfig):
    """Rotary embedding by row and column, counted in patches (Heo et al. 2024, section 3.2, in the order of Qwen2-VL).

    Scores depend on the distances of rows and of columns alone.
    """

    def places(self, tokens: Tokens) -> Shaped[Tensor, "B T 2"]:
        return tokens.coords


@final
@config
class CentredRoPEConfig(GridRoPEConfig):
    """Rotary embedding by where the middle of a patch lies in its picture, from -1 to 1 (Siméoni et al. 2025, DINOv3).

    So a picture of more patches is the same picture, seen more finely. Each axis goes by its own side.
    """

    theta: Theta = 100.0

    def describe(self) -> str:
        return f"rotary θ={self.theta:,.0f} by the place in its picture"

    def places(self, tokens: Tokens) -> Shaped[Tensor, "B T 2"]:
        return 2 * math.pi * ((2 * tokens.coords + 1).double() / tokens.extent - 1)
