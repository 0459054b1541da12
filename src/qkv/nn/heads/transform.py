"""What some heads do to the stream before they read it out."""

from typing import final

from torch import nn

from qkv.config import Config, Configured, config
from qkv.nn.activations import ACTIVATIONS, ActivationName
from qkv.nn.norms import NormConfig
from qkv.shapes import Float, Tensor


@final
@config
class TransformConfig(Config):
    """norm(activation(W x + b)), as BERT's code calls it before its masked language model (Devlin et al. 2019).

    Attributes:
        activation: Name of the nonlinearity.
        norm: The norm after it; None: there is none.
        bias: Whether the linear map has a bias.
    """

    activation: ActivationName = "gelu"
    norm: NormConfig | None = None
    bias: bool = True

    def build(self, d_in: int, d_out: int) -> "Transform":
        """That of vectors of `d_in` numbers to `d_out`."""
        return Transform(self, d_in, d_out)


@final
class Transform(Configured, nn.Module, config=TransformConfig):
    """A linear map, a nonlinearity, a norm."""

    def __init__(self, config: TransformConfig, d_in: int, d_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_in, d_out, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = nn.Identity() if config.norm is None else config.norm.build(d_out)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Each vector, transformed."""
        return self.norm(self.activation(self.proj(x)))

    def flops(self) -> int:
        """Floating-point operations for one vector."""
        return 2 * self.proj.weight.numel()
