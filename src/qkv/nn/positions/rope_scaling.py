"""Ways to stretch rotary embedding to longer texts than it was trained on."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, final

import torch

from qkv.config import Config, Positive, config
from qkv.errors import ConfigError
from qkv.ops.rotary import frequencies
from qkv.shapes import Int, Tensor

Lengths = Int[Tensor, "b t"]


@config
class RoPEScalingConfig(Config, ABC):
    """Base of the ways to stretch rotary embedding to longer texts than it was trained on."""

    by_length: ClassVar[bool] = False
    """Whether the same token turns differently in a longer text."""

    @abstractmethod
    def frequencies(self, theta: float, width: int, lengths: Lengths) -> Tensor:
        """Radians per token of each pair, float64 (width / 2,), or (b, t, width / 2) where they depend on the length.

        Args:
            theta: The base.
            width: Rotated coordinates of a head.
            lengths: `Tokens.lengths`.
        """

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied with."""
        return 1.0

    def check_width(self, width: int) -> None:
        """Raise where it is not made for heads of so many rotated coordinates."""

    def keeps(self, before: int, after: int) -> bool:
        """Whether the keys of a text of `before` tokens stay as they are while it grows to `after`."""
        return True


@final
@config
class LinearScalingConfig(RoPEScalingConfig):
    """Positions divided by `factor` (Chen et al. 2023, Position Interpolation, equation 4)."""

    factor: float

    def frequencies(self, theta: float, width: int, lengths: Lengths) -> Tensor:
        return frequencies(theta, width, lengths.device) / self.factor


@final
@config
class NTKScalingConfig(RoPEScalingConfig):
    """A larger base, θ · factor^(K / (K - 2)): the slowest pair is stretched by `factor`, the fastest not at all.

    Source: "NTK-aware" scaling, as described in Peng et al. 2023 (YaRN), section 3.1, definition 1.
    """

    factor: float

    def frequencies(self, theta: float, width: int, lengths: Lengths) -> Tensor:
        return frequencies(theta * self.factor ** (width / (width - 2)), width, lengths.device)

    def check_width(self, width: int) -> None:
        _check_exponent(self, width)


@final
@config
class DynamicNTKScalingConfig(RoPEScalingConfig):
    """NTK scaling with a factor that grows with the text, beyond `original_length` tokens (Peng et al. 2023, 3.3).

    The same token is rotated differently in a longer text, so that writing on reads the whole text anew for each token
    beyond `original_length`. (Hugging Face keeps the stale keys.)
    """

    by_length: ClassVar[bool] = True

    factor: float
    original_length: int

    def frequencies(self, theta: float, width: int, lengths: Lengths) -> Tensor:
        stretch = lengths[..., None].clamp(min=self.original_length).double() / self.original_length
        factor = self.factor * stretch - (self.factor - 1)
        return frequencies(theta * factor ** (width / (width - 2)), width, lengths.device)

    def check_width(self, width: int) -> None:
        _check_exponent(self, width)

    def keeps(self, before: int, after: int) -> bool:
        return after <= self.original_length


def _check_exponent(config: RoPEScalingConfig, width: int) -> None:
    """K / (K - 2) is to be a number."""
    if width < 3:
        raise ConfigError(
            f"{config.tag()} needs more than the {width} rotated coordinates of a head; give it 4 or more"
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
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def frequencies(self, theta: float, width: int, lengths: Lengths) -> Tensor:

        def pair_that_turns(times: float) -> float:
            return width * math.log(self.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high = high + 0.001 if low == high else high
        pair = torch.arange(width // 2, dtype=torch.float64, device=lengths.device)
        interpolate = ((pair - low) / (high - low)).clamp(0, 1)
        plain = frequencies(theta, width, lengths.device)
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

    def frequencies(self, theta: float, width: int, lengths: Lengths) -> Tensor:
        plain = frequencies(theta, width, lengths.device)
        turns = self.original_length * plain / (2 * math.pi)
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return plain / self.factor * (1 - keep) + plain * keep


@final
@config
class LongRoPEScalingConfig(RoPEScalingConfig):
    """Each pair's frequency divided by a factor of its own, found by search (Ding et al. 2024, LongRoPE; Phi-3).

    Texts of up to `original_length` tokens take the short factors, longer ones the long: where a text grows past that,
    it is read anew.

    Attributes:
        original_length: Tokens of the longest text before it was stretched.
        short_factors: One for each pair, for texts of up to `original_length` tokens.
        long_factors: One for each pair, for longer texts.
        attention_factor: What cosines and sines are multiplied with, whatever the length.
    """

    by_length: ClassVar[bool] = True

    original_length: int
    short_factors: tuple[Positive, ...]
    long_factors: tuple[Positive, ...]
    attention_factor: float = 1.0

    @property
    def magnitude(self) -> float:
        return self.attention_factor

    def frequencies(self, theta: float, width: int, lengths: Lengths) -> Tensor:
        short, long = (
            torch.tensor(factors, dtype=torch.float64, device=lengths.device)
            for factors in (self.short_factors, self.long_factors)
        )
        factors = torch.where(lengths[..., None] <= self.original_length, short, long)
        return frequencies(theta, width, lengths.device) / factors

    def check_width(self, width: int) -> None:
        if not len(self.short_factors) == len(self.long_factors) == width // 2:
            raise ConfigError(
                f"LongRoPE has {len(self.short_factors)} short and {len(self.long_factors)} long factors, and a head "
                f"has {width // 2} pairs that turn; give one for each"
            )

    def keeps(self, before: int, after: int) -> bool:
        return before > self.original_length or after <= self.original_length
