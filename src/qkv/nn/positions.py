"""Positions: learned and sinusoidal tables that are added to the embeddings, and rotary embedding inside attention."""

import math
from abc import ABC, abstractmethod
from typing import final

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import Config, Configured, config
from qkv.errors import ConfigError
from qkv.ops.rotary import RotaryLayout, Rotation, rotation
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import Layout, Tokens

# --- added to the embeddings ----------------------------------------------------------------------------------------


class PositionTable(Configured, nn.Module, ABC):
    """Base of what is added to the embeddings: a vector for each index."""

    @abstractmethod
    def forward(self, index: Int[Tensor, "B T"], dtype: torch.dtype) -> Float[Tensor, "B T D"]:
        """The vectors of these indices."""


@config
class PositionTableConfig(Config, ABC):
    """Base of the configs of position tables."""

    def build(self, d_model: int) -> PositionTable:
        """The table for embeddings of width `d_model`."""
        return self._build(d_model)


@final
@config
class LearnedPositionsConfig(PositionTableConfig):
    """One trained vector for each of `length` positions (Gehring et al. 2017; GPT-2, BERT)."""

    length: int


@final
class LearnedPositions(PositionTable, config=LearnedPositionsConfig):
    """A trained table."""

    def __init__(self, config: LearnedPositionsConfig, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.length, d_model))

    def forward(self, index: Int[Tensor, "B T"], dtype: torch.dtype) -> Float[Tensor, "B T D"]:
        """The vectors of these indices.

        Raises:
            ConfigError: There is no such index (on CPUs; the stack has checked that none is too large).
        """
        try:
            return F.embedding(index, self.weight).to(dtype)  # `weight[index]` would take -1 for the last
        except IndexError:
            raise ConfigError(
                f"indices from {int(index.min())} to {int(index.max())} do not fit a table of {len(self.weight)} "
                "positions; an index counts from 0 at the start of its document"
            ) from None


@final
@config
class SinusoidalPositionsConfig(PositionTableConfig):
    """sin and cos of position / base^(2i / D), neighbours in the vector, for any length.

    Source: Vaswani et al. 2017, section 3.5.
    """

    base: float = 10_000.0


@final
class SinusoidalPositions(PositionTable, config=SinusoidalPositionsConfig):
    """A table that is computed and has no weights."""

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
class AttentionPositionConfig(Config, ABC):
    """Base of what tells attention where tokens stand: a rotation of queries and keys, or a bias of the scores."""

    @abstractmethod
    def describe(self) -> str:
        """In a few words."""


@config
class ScoreBiasConfig(AttentionPositionConfig, ABC):
    """Base of the biases that depend on the distance between query and key alone."""

    def describe(self) -> str:
        """Its name."""
        return f"{self.tag()} on the scores"

    def build(self, n_heads: int) -> "ScoreBias":
        """The bias for so many query heads."""
        return self._build(n_heads)


class ScoreBias(Configured, nn.Module, ABC):
    """Base of the biases."""

    @abstractmethod
    def forward(self, n_keys: int, like: Tensor) -> Float[Tensor, "H distances"]:
        """For each head a number for every distance key - query from -R to R, in at least float32.

        Args:
            n_keys: R + 1, unless the bias levels off before that.
            like: A tensor on the device, and of the type, of the queries.
        """


@final
@config
class ALiBiConfig(ScoreBiasConfig):
    """-slope · |distance|, with a fixed slope for each head.

    Source: Press et al. 2022 (ALiBi), section 3, whose slopes are 2^(-8 i / n) for heads i = 1 to n; where n is no
    power of two, those of the next lower one, then every other one of the next higher, as in the authors' code.
    """

    def build(self, n_heads: int) -> "ALiBi":
        """The bias for so many query heads."""
        return ALiBi(n_heads)


@final
class ALiBi(ScoreBias):
    """One slope for each head; no weights."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        n = 2 ** int(math.log2(n_heads))
        slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
        self.slopes = slopes + [2 ** (-4 * i / n) for i in range(1, 2 * (n_heads - n), 2)]

    def forward(self, n_keys: int, like: Tensor) -> Float[Tensor, "H distances"]:
        """Straight lines down from distance 0."""
        wide = torch.promote_types(like.dtype, torch.float32)
        slopes = torch.tensor(self.slopes, dtype=wide, device=like.device)  # no buffer, which `.bfloat16()` would round
        return -slopes[:, None] * torch.arange(1 - n_keys, n_keys, device=like.device).abs()


@final
@config
class T5BiasConfig(ScoreBiasConfig):
    """A trained number for each head and bucket of distances: one a distance up close, then ever wider ones.

    Source: Raffel et al. 2020 (T5), section 2.1; the buckets are those of the authors' code.

    Attributes:
        buckets: How many; with `two_sided` half of them for keys after the query.
        max_distance: From there on all distances share the last bucket.
        two_sided: Whether keys after the query have buckets of their own (encoders); else they have that of distance 0.
    """

    buckets: int = 32
    max_distance: int = 128
    two_sided: bool = False

    def __post_init__(self) -> None:
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise ConfigError(
                f"buckets={self.buckets} must be at least 4 and max_distance={self.max_distance} above half of it"
            )


@final
class T5Bias(ScoreBias, config=T5BiasConfig):
    """A trained table of (heads, buckets)."""

    def __init__(self, config: T5BiasConfig, n_heads: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(n_heads, config.buckets))

    def forward(self, n_keys: int, like: Tensor) -> Float[Tensor, "H distances"]:
        """The number of each distance's bucket."""
        reach = min(max(n_keys - 1, 0), self.config.max_distance)
        table = self.weight.to(torch.promote_types(like.dtype, torch.float32))
        return table[:, t5_bucket(torch.arange(-reach, reach + 1, device=like.device), self.config)]


def t5_bucket(distance: Int[Tensor, " n"], config: T5BiasConfig) -> Int[Tensor, " n"]:
    """The bucket of each distance key - query."""
    n, first = config.buckets, torch.zeros_like(distance)
    if config.two_sided:
        n //= 2
        first = (distance > 0) * n
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = n // 2
    # float32, as in the authors' code: at the edges of the buckets the rounding decides.
    wider = torch.log(distance.float().clamp(min=1) / exact) / math.log(config.max_distance / exact) * (n - exact)
    wide = (exact + wider.long()).clamp(max=n - 1)
    return first + torch.where(distance < exact, distance, wide)


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

    def check_width(self, width: int) -> None:
        """Raise where it is not made for heads of so many rotated coordinates."""

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
class LongRoPEScalingConfig(RoPEScalingConfig):
    """Each pair's frequency divided by a factor of its own, found by search (Ding et al. 2024, LongRoPE; Phi-3).

    Texts of up to `original_length` tokens take the short factors, longer ones the long. So keys in a cache go stale
    where a text grows past that: a cache that could hold more is refused.

    Attributes:
        original_length: Tokens of the longest text before it was stretched.
        short_factors: One for each pair, for texts of up to `original_length` tokens.
        long_factors: One for each pair, for longer texts.
        attention_factor: What cosines and sines are multiplied with, whatever the length.
    """

    original_length: int
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        if not all(factor > 0 for factor in self.short_factors + self.long_factors):
            raise ConfigError("the factors of LongRoPE divide frequencies and must be above 0; mend those that are not")

    @property
    def magnitude(self) -> float:
        """The attention factor."""
        return self.attention_factor

    def frequencies(self, theta: float, width: int, longest: int, device: torch.device) -> Tensor:
        """The frequencies for a text of `longest` tokens."""
        factors = self.short_factors if longest <= self.original_length else self.long_factors
        return _frequencies(theta, width, device) / torch.tensor(factors, dtype=torch.float64, device=device)

    def check_width(self, width: int) -> None:
        """A factor for each pair."""
        if not len(self.short_factors) == len(self.long_factors) == width // 2:
            raise ConfigError(
                f"LongRoPE has {len(self.short_factors)} short and {len(self.long_factors)} long factors, and a head "
                f"has {width // 2} pairs that turn; give one for each"
            )

    def check_cache(self, capacity: int) -> None:
        """Refuse a cache in which keys could go stale."""
        if capacity > self.original_length:
            raise ConfigError(
                f"LongRoPE rotates anew beyond {self.original_length} tokens and a cache for {capacity} would go "
                f"stale; use a cache of at most {self.original_length} tokens"
            )


@final
@config
class RoPEConfig(AttentionPositionConfig):
    """Rotary position embedding of queries and keys (Su et al. 2021, RoFormer, section 3.2).

    Attributes:
        theta: Base of the frequencies θ^(-2i / K).
        layout: Which coordinates make a pair: "half" (i and i + K/2: GPT-NeoX, Hugging Face) or "interleaved" (2i and
            2i + 1: the paper, Meta's code).
        scaling: How it is stretched to longer texts, if it is.
        fraction: Share of a head's coordinates that are rotated, the first ones (GPT-NeoX); the rest know no position.
    """

    theta: float = 10_000.0
    layout: RotaryLayout = "half"
    scaling: RoPEScalingConfig | None = None
    fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ConfigError(f"theta={self.theta} must be above 1; it is usually 10000 or more")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction={self.fraction} must be above 0 and at most 1")

    def describe(self) -> str:
        """Base, share of the coordinates, scaling."""
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

    def rotation(self, tokens: Tokens, width: int, longest: int, dtype: torch.dtype) -> Rotation:
        """The angles of these tokens, for heads of `width` rotated coordinates."""
        # Rows of one full sequence each may start at different places in decoding, but without a cache they are alike.
        position = tokens.coords[..., 0]
        if tokens.layout is Layout.FULL and position.stride(0) == 0:
            position = position[:1]
        wide = torch.promote_types(dtype, torch.float32)
        if self.scaling is None:
            frequencies = _frequencies(self.theta, width, position.device)
            return rotation(position, frequencies, self.layout, magnitude=1.0, dtype=wide)
        frequencies = self.scaling.frequencies(self.theta, width, longest, position.device)
        return rotation(position, frequencies, self.layout, magnitude=self.scaling.magnitude, dtype=wide)


def _frequencies(theta: float, width: int, device: torch.device) -> Tensor:
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
