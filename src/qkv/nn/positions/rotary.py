"""Rotary position embedding, as data."""

from typing import Annotated, final

import torch

from qkv.config import Config, config, must
from qkv.errors import ConfigError
from qkv.nn.positions.rope_scaling import RoPEScalingConfig
from qkv.ops.rotary import RotaryLayout, Rotation, frequencies, rotation
from qkv.tokens import Layout, Tokens


@final
@config
class RoPEConfig(Config):
    """Rotary position embedding of queries and keys (Su et al. 2021, RoFormer, section 3.2).

    Attributes:
        theta: Base of the frequencies θ^(-2i / K).
        layout: Which coordinates make a pair: "half" (i and i + K/2: GPT-NeoX, Hugging Face) or "interleaved" (2i and
            2i + 1: the paper, Meta's code).
        scaling: How it is stretched to longer texts, if it is.
        fraction: Share of a head's coordinates that are rotated, the first ones (GPT-NeoX); the rest know no position.
    """

    theta: Annotated[float, must("be above 1; it is usually 10000 or more", lambda theta: theta > 1)] = 10_000.0
    layout: RotaryLayout = "half"
    scaling: RoPEScalingConfig | None = None
    fraction: Annotated[float, must("be above 0 and at most 1", lambda share: 0 < share <= 1)] = 1.0

    def describe(self) -> str:
        scaling = f" ({self.scaling.tag().removesuffix('Scaling')})" if self.scaling else ""
        share = f" on {self.fraction:.0%}" if self.fraction < 1 else ""
        return f"rotary θ={self.theta:,.0f}{share}{scaling}"

    def width(self, head_dim: int) -> int:
        """How many coordinates of a head are rotated.

        Raises:
            ConfigError: The number is odd, and coordinates turn in pairs.
        """
        width = int(head_dim * self.fraction)
        if width % 2 or not width:
            share = "" if self.fraction == 1 else f", of which {width} turn,"
            raise ConfigError(f"rotary embedding pairs coordinates and head_dim={head_dim}{share} is odd; make it even")
        if self.scaling is not None:
            self.scaling.check_width(width)
        return width

    def rotation(self, tokens: Tokens, width: int, dtype: torch.dtype) -> Rotation:
        """The angles of these tokens, for heads of `width` rotated coordinates.

        Raises:
            ConfigError: The tokens have several coordinates each.
        """
        if (n := tokens.coords.shape[-1]) != 1:
            raise ConfigError(f"RoPE turns by 1 coordinate and the tokens have {n} each; give `Tokens.coords` one")
        # Rows of one full sequence each may start at different places in decoding, but without a cache they are alike.
        position = tokens.coords[..., 0]
        alike = tokens.layout is Layout.FULL and position.stride(0) == 0
        position = position[:1] if alike else position
        wide = torch.promote_types(dtype, torch.float32)
        if self.scaling is None:
            plain = frequencies(self.theta, width, position.device)
            return rotation(position, plain, self.layout, magnitude=1.0, dtype=wide)
        # To know the lengths of several texts a GPU is waited for; most scalings ask for their device alone.
        lengths = tokens.lengths if self.scaling.by_length else tokens.index[:, :1]
        scaled = self.scaling.frequencies(self.theta, width, lengths[:1] if alike else lengths)
        return rotation(position, scaled, self.layout, magnitude=self.scaling.magnitude, dtype=wide)
