"""Normalisation over the width, with ε inside the root, computed in at least float32."""

from abc import ABC, abstractmethod
from typing import Annotated, final

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import Config, Configured, config, must
from qkv.shapes import Float, Tensor


class Norm(Configured, nn.Module, ABC):
    """Base of the norms: one vector in, one of the same width out."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        """Normalise each vector."""


@config
class NormConfig(Config, ABC):
    """Base of the configs of norms.

    Attributes:
        eps: What is added to the variance or mean square, inside the root.
    """

    eps: Annotated[float, must("not be negative", lambda eps: eps >= 0)] = 1e-5

    def build(self, width: int) -> Norm:
        """The norm of vectors of `width` numbers."""
        return self._build(width)


@final
@config
class LayerNormConfig(NormConfig):
    """(x - mean) / √(var + ε) · weight + bias, with the biased variance.

    Source: Ba et al. 2016, equation 3; ε as in the authors' code.
    """

    bias: bool = True


@final
class LayerNorm(Norm, config=LayerNormConfig):
    """Normalises mean and variance; trains a weight and, if configured, a bias."""

    def __init__(self, config: LayerNormConfig, width: int) -> None:
        super().__init__()
        self.eps = config.eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if config.bias else None

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@final
@config
class RMSNormConfig(NormConfig):
    """x / √(mean(x²) + ε) · (offset + weight).

    Source: Zhang and Sennrich 2019, equation 4; ε as in the authors' code. The weight is applied before rounding to the
    type of x (Llama's own code and Hugging Face round first; the difference is within one rounding of that type).

    Attributes:
        offset: Added to the weight, in at least float32. Gemma's is 1: its weights lie around 0, where bfloat16 is
            finest, and decay towards a factor of 1.
    """

    offset: float = 0.0


@final
class RMSNorm(Norm, config=RMSNormConfig):
    """Normalises the mean square; trains a weight."""

    def __init__(self, config: RMSNormConfig, width: int) -> None:
        super().__init__()
        self.eps, self.offset = config.eps, config.offset
        self.weight = nn.Parameter(torch.full((width,), 1 - config.offset))

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        if x.dtype in (torch.float32, torch.float64):
            return self._normed(x)
        return self._normed(x.float()).to(x.dtype)

    def _normed(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], weight + self.offset if self.offset else weight, self.eps)


@final
@config
class NoNormConfig(NormConfig):
    """x as it is: where a block's input is normed already, as in the first layer of ModernBERT (Warner et al. 2024)."""


@final
class NoNorm(Norm, config=NoNormConfig):
    """Nothing."""

    def __init__(self, config: NoNormConfig, width: int) -> None:
        super().__init__()

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return x
