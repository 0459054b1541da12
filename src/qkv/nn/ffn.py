"""The feed-forward network of a block, applied to each token alone: plain, or gated (the GLU family)."""

import math
from typing import ClassVar, final

from torch import nn

from qkv.config import Count, config
from qkv.context import Context
from qkv.nn.activations import ACTIVATIONS, ActivationName
from qkv.nn.sublayer import Sublayer, SublayerConfig, in_turn
from qkv.shapes import Float, Int, Tensor


@final
@config
class FFNConfig(SublayerConfig):
    """down(activation(up(x))): Vaswani et al. 2017, section 3.3.

    Attributes:
        d_ff: Inner width. None: 4 d_model.
        activation: Name of the nonlinearity.
        bias: Whether the two projections have biases.
    """

    name: ClassVar[str] = "ffn"

    d_ff: Count | None = None
    activation: ActivationName = "gelu"
    bias: bool = False

    def notes(self, d_model: int) -> list[str]:
        return [f"{d_model:,} → {self.d_ff or 4 * d_model:,} → {d_model:,}, {self.activation}"]


@final
class FFN(Sublayer, config=FFNConfig):
    """Two projections with a nonlinearity between them."""

    def __init__(self, config: FFNConfig, d_model: int) -> None:
        super().__init__(config)
        d_ff = config.d_ff or 4 * d_model
        self.activation = ACTIVATIONS[config.activation]
        self.up_proj = nn.Linear(d_model, d_ff, bias=config.bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=config.bias)

    def update(self, x: Float[Tensor, "B T D"], ctx: Context) -> tuple[Float[Tensor, "B T D"], None]:
        return self.down_proj(self.activation(self.up_proj(x))), None

    def residual_weights(self) -> list[Tensor]:
        return [self.down_proj.weight]

    def slices(self) -> dict[str, dict[str, Int[Tensor, " rows"]]]:
        return {
            "up_proj": in_turn(1, up=self.up_proj.out_features),
            "down_proj": in_turn(1, down=self.down_proj.out_features),
        }


@final
@config
class GLUConfig(SublayerConfig):
    """down(activation(gate(x)) · up(x)): Shazeer 2020, section 2.

    `activation="sigmoid"` is the GLU of Dauphin et al. 2017, "silu" SwiGLU, "gelu" GEGLU, "relu" ReGLU, "identity" the
    bilinear one.

    Attributes:
        d_ff: Inner width. None: 8/3 d_model rounded to a multiple of `multiple_of`; three matrices of this width have
            as many weights as the two of an FFN of 4 d_model.
        activation: Name of the gate's nonlinearity.
        bias: Whether the projections have biases.
        multiple_of: What a computed `d_ff` is rounded to (to the nearest; upwards from the middle).
    """

    name: ClassVar[str] = "ffn"

    d_ff: Count | None = None
    activation: ActivationName = "silu"
    bias: bool = False
    multiple_of: Count = 1

    def notes(self, d_model: int) -> list[str]:
        return [f"{d_model:,} → 2 × {self.width(d_model):,} → {d_model:,}", f"gated by {self.activation}"]

    def width(self, d_model: int) -> int:
        """The inner width for a stream of width `d_model`."""
        if self.d_ff is not None:
            return self.d_ff
        unit = 3 * self.multiple_of
        return max(1, (2 * 8 * d_model + unit) // (2 * unit)) * self.multiple_of


def glu_group(d_ff: int) -> int:
    """Rows of the gate that stand together, before as many rows of the values, in a GLU of inner width `d_ff`.

    Groups of 32 are wide enough for the vector units of a processor. A width that 8 does not divide is one group: it
    could not be shared out among devices in wide groups, and narrow ones are slow.
    """
    group = math.gcd(d_ff, 32)
    return group if group >= 8 else d_ff


@final
class GLU(Sublayer, config=GLUConfig):
    """`gate_up_proj.weight` holds rows of the gate and rows of the values in turn, `glu_group` of each at a time.

    So there is one product, and a share of the groups is a run of rows, which can be put on another device.
    """

    def __init__(self, config: GLUConfig, d_model: int) -> None:
        super().__init__(config)
        d_ff = config.width(d_model)
        self.group = glu_group(d_ff)
        self.activation = ACTIVATIONS[config.activation]
        self.gate_up_proj = nn.Linear(d_model, 2 * d_ff, bias=config.bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=config.bias)

    def update(self, x: Float[Tensor, "B T D"], ctx: Context) -> tuple[Float[Tensor, "B T D"], None]:
        gate, up = self.gate_up_proj(x).unflatten(-1, (-1, 2, self.group)).unbind(-2)  # (B, T, groups, group) each
        return self.down_proj((self.activation(gate) * up).flatten(-2)), None

    def residual_weights(self) -> list[Tensor]:
        return [self.down_proj.weight]

    def slices(self) -> dict[str, dict[str, Int[Tensor, " rows"]]]:
        d_ff = self.down_proj.in_features
        return {
            "gate_up_proj": in_turn(d_ff // self.group, gate=self.group, up=self.group),
            "down_proj": in_turn(1, down=self.down_proj.out_features),
        }
