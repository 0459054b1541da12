"""Biases of the scores that depend on the distance between query and key: ALiBi and T5."""

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import nn

from qkv.config import Config, Configured, config
from qkv.errors import ConfigError
from qkv.shapes import Float, Int, Tensor


@config
class ScoreBiasConfig(Config, ABC):
    """Base of the biases that depend on the distance between query and key alone."""

    def describe(self) -> str:
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


@final
class ALiBi(ScoreBias, config=ALiBiConfig):
    """One slope for each head; no weights."""

    def __init__(self, config: ALiBiConfig, n_heads: int) -> None:
        super().__init__()
        n = 2 ** int(math.log2(n_heads))
        slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
        self.slopes = slopes + [2 ** (-4 * i / n) for i in range(1, 2 * (n_heads - n), 2)]

    def forward(self, n_keys: int, like: Tensor) -> Float[Tensor, "H distances"]:
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
