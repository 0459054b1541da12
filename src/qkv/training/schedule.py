"""How the learning rate moves over a run."""

import math
from abc import ABC, abstractmethod
from typing import final

from qkv.config import Config, config
from qkv.errors import ConfigError


@config
class ScheduleConfig(Config, ABC):
    """Base of the schedules.

    Attributes:
        warmup: Steps over which the learning rate rises from 0, in a straight line.
        final: Share of the highest learning rate that is left at the end.
    """

    warmup: int = 50
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup < 0 or not 0 <= self.final <= 1:
            raise ConfigError(f"warmup={self.warmup} must not be negative and final={self.final} be between 0 and 1")

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied with in `step` (from 0) of `steps`."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return self.after_warmup(step, steps)

    @abstractmethod
    def after_warmup(self, step: int, steps: int) -> float:
        """The factor once the warm-up is over."""


@final
@config
class CosineConfig(ScheduleConfig):
    """Half a cosine from the end of the warm-up to the last step (Loshchilov and Hutter 2017, without restarts)."""

    def after_warmup(self, step: int, steps: int) -> float:
        """From 1 to `final`."""
        done = (step - self.warmup) / max(1, steps - self.warmup)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * min(1.0, done))) / 2


@final
@config
class WSDConfig(ScheduleConfig):
    """Warm-up, stable, decay: constant, then down in a straight line over the last steps (Hu et al. 2024, section 4).

    Attributes:
        decay: Share of all steps that the way down takes.
    """

    decay: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay={self.decay} is a share of the steps and must be between 0 and 1")

    def after_warmup(self, step: int, steps: int) -> float:
        """1, then down to `final`."""
        left = (steps - step) / max(1.0, self.decay * steps)
        return self.final + (1 - self.final) * min(1.0, left)
