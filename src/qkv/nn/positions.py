"""Positions: learned and sinusoidal tables that are added to the embeddings, and rotary embedding inside attention."""

import math
from abc import ABC, abstractmethod
from typing import Literal, final

import torch
from torch import nn

from qkv.config import Config, config
from qkv.errors import ConfigError
from qkv.ops.rotary import Rotation, rotation
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import Layout, Tokens

# --- added to the embeddings ----------------------------------------------------------------------------------------


class PositionTable(nn.Module, ABC):
    """Base of what is added to the embeddings: a vector for each index."""

    @abstractmethod
    def forward(self, index: Int[Tensor, "B T"], dtype: torch.dtype) -> Float[Tensor, "B T D"]:
        """The vectors of these indices."""


@config
class PositionTableConfig(Config, ABC):
    """Base of the configs of position tables."""

    @abstractmethod
    def build(self, d_model: int) -> PositionTable:
        """The table for embeddings of width `d_model`."""


@final
@config
class LearnedPositionsConfig(PositionTableConfig):
    """One trained vector for each of `length` positions (Gehring et al. 2017; GPT-2, BERT)."""

    length: int

    def build(self, d_model: int) -> "LearnedPositions":
        """The table for embeddings of width `d_model`."""
        return LearnedPositions(self, d_model)


@final
class LearnedPositions(PositionTable):
    """See `LearnedPositionsConfig`."""

    def __init__(self, config: LearnedPositionsConfig, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.length, d_model))

    def forward(self, index: Int[Tensor, "B T"], dtype: torch.dtype) -> Float[Tensor, "B T D"]:
        """The vectors of these indices; the stack has checked that there are enough."""
        return self.weight[index].to(dtype)


@final
@config
class SinusoidalPositionsConfig(PositionTableConfig):
    """sin and cos of position / base^(2i / D), neighbours in the vector, for any length.

    Source: Vaswani et al. 2017, section 3.5.
    """

    base: float = 10_000.0

    def build(self, d_model: int) -> "SinusoidalPositions":
        """The table for embeddings of width `d_model`."""
        return SinusoidalPositions(self, d_model)


@final
class SinusoidalPositions(PositionTable):
    """See `SinusoidalPositionsConfig`."""

    def __init__(self, config: SinusoidalPositionsConfig, d_model: int) -> None:
        super().__init__()
        if d_model % 2:
            raise ConfigError(f"sinusoidal positions need an even width and d_model={d_model}; make it even")
        self.base, self.d_model = config.base, d_model

    def forward(self, index: Int[Tensor, "B T"], dtype: torch.dtype) -> Float[Tensor, "B T D"]:
        """The vectors of these indices; the angles are computed in float64."""
        frequencies = _frequencies(self.base, self.d_model, index.device)
        angle = index[..., None] * frequencies
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2).to(dtype)


# --- inside attention -----------------------------------------------------------------------------------------------


@config
class RoPEScalingConfig(Config, ABC):
    """Base of the ways to stretch rotary embedding to longer texts than it was trained on."""

    @abstractmethod
    def frequencies(self, theta: float, width: int, longest: int, device: torch.device) -> Tensor:
        """Radians per token of each pair, float64 (width / 2,).

        Args:
            theta: The base.
            width: Rotated coordinates of a head.
            longest: Tokens in the longest row, counted from the start of its document.
            device: Where to put them.
        """

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied with."""
        return 1.0

    def check_cache(self, capacity: int) -> None:
        """Raise where keys that were rotated earlier would not fit those to come."""


@final
@config
class LinearScalingConfig(RoPEScalingConfig):
    """Positions divided by `factor` (Chen et al. 2023, Position Interpolation, equation 4)."""

    factor: float

    def frequencies(self, theta: float, width: int, longest: int, device: torch.device) -> Tensor:
        """All frequencies divided by `factor`."""
        return _frequencies(theta, width, device) / self.factor


@final
@config
class NTKScalingConfig(RoPEScalingConfig):
    """A larger base, θ · factor^(K / (K - 2)): the slowest pair is stretched by `factor`, the fastest not at all.

    Source: "NTK-aware" scaling, as described in Peng et al. 2023 (YaRN), section 3.1, definition 1.
    """

    factor: float

    def frequencies(self, theta: float, width: int, longest: int, device: torch.device) -> Tensor:
        """The frequencies of the larger base."""
        return _frequencies(theta * self.factor ** (width / (width - 2)), width, device)


@final
@config
class DynamicNTKScalingConfig(RoPEScalingConfig):
    """NTK scaling with a factor that grows with the text, beyond `original_length` tokens (Peng et al. 2023, 3.3).

    The same token is rotated differently in a longer text, so keys in a cache go stale: a cache that could hold more
    than `original_length` tokens is refused. (Hugging Face keeps the stale keys.)
    """

    factor: float
    original_length: int

    def frequencies(self, theta: float, width: int, longest: int, device: torch.device) -> Tensor:
        """The frequencies for a text of `longest` tokens."""
        stretch = max(longest, self.original_length) / self.original_length
        factor = self.factor * stretch - (self.factor - 1)
        return _frequencies(theta * factor ** (width / (width - 2)), width, device)

    def check_cache(self, capacity: int) -> None:
        """Refuse a cache in which keys could go stale."""
        if capacity > self.original_length:
            raise ConfigError(
                f"dynamic NTK scaling rotates anew beyond {self.original_length} tokens and a cache for {capacity} "
                f"would go stale; use a cache of at most {self.original_length} tokens, or NTKScaling"
            )


@final
@config
class YaRNScalingConfig(RoPEScalingConfig):
    """Slow pairs interpolated, fast ones kept, a ramp between, and a temperature (Peng et al. 2023, section 3.2-3.4).

    Attributes:
        factor: How many times longer the texts become.
        original_length: Tokens of the longest text in training.
        beta_fast: Pairs that turn more often than this over `original_length` are kept.
        beta_slow: Pairs that turn less often than this are interpolated.
        attention_factor: What cosines and sines are multiplied with; None: 0.1 ln(factor) + 1.
        truncate: Round the ends of the ramp to whole pairs, as the authors' code does.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        """The attention factor."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def frequencies(self, theta: float, width: int, longest: int, device: torch.device) -> Tensor:
        """A mixture, pair by pair, of the kept and the interpolated frequencies."""

        def pair_that_turns(times: float) -> float:
            return width * math.log(self.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high = high + 0.001 if low == high else high
        pair = torch.arange(width // 2, dtype=torch.float64, device=device)
        interpolate = ((pair - low) / (high - low)).clamp(0, 1)
        plain = _frequencies(theta, width, device)
        return plain / self.factor * interpolate + plain * (1 - interpolate)


@final
@config
class Llama3ScalingConfig(RoPEScalingConfig):
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a linear blend between.

    Source: Grattafiori et al. 2024 (The Llama 3 Herd of Models) name the change; the formula is that of Meta's code.

    Attributes:
        factor: How many times longer the texts become.
        original_length: Tokens of the longest text in training.
        low_freq_factor: Wavelengths above `original_length / low_freq_factor` tokens are divided.
        high_freq_factor: Wavelengths below `original_length / high_freq_factor` tokens are kept.
    """

    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def frequencies(self, theta: float, width: int, longest: int, device: torch.device) -> Tensor:
        """A mixture, pair by pair, of the kept and the divided frequencies."""
        plain = _frequencies(theta, width, device)
        turns = self.original_length * plain / (2 * math.pi)
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return plain / self.factor * (1 - keep) + plain * keep


@final
@config
class RoPEConfig(Config):
    """Rotary position embedding of queries and keys (Su et al. 2021, RoFormer, section 3.2).

    Attributes:
        theta: Base of the frequencies θ^(-2i / K).
        layout: Which coordinates make a pair: "half" (i and i + K/2: GPT-NeoX, Hugging Face) or "interleaved" (2i and
            2i + 1: the paper, Meta's code).
        scaling: How it is stretched to longer texts, if it is.
    """

    theta: float = 10_000.0
    layout: Literal["half", "interleaved"] = "half"
    scaling: RoPEScalingConfig | None = None

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ConfigError(f"theta={self.theta} must be above 1; it is usually 10000 or more")

    def rotation(self, tokens: Tokens, width: int, longest: int, dtype: torch.dtype) -> Rotation:
        """The angles of these tokens, for heads of `width` rotated coordinates."""
        # Rows of one full sequence each may start at different places in decoding, but without a cache they are alike.
        position = tokens.coords[..., 0]
        if tokens.layout is Layout.FULL and position.stride(0) == 0:
            position = position[:1]
        wide = torch.promote_types(dtype, torch.float32)
        if self.scaling is None:
            return rotation(position, _frequencies(self.theta, width, position.device), magnitude=1.0, dtype=wide)
        frequencies = self.scaling.frequencies(self.theta, width, longest, position.device)
        return rotation(position, frequencies, magnitude=self.scaling.magnitude, dtype=wide)


def _frequencies(theta: float, width: int, device: torch.device) -> Tensor:
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
