"""What stands on the residual stream: a sublayer maps the stream to an update, whatever it does inside."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import Config, Configured, config
from qkv.context import Context
from qkv.errors import ConfigError
from qkv.shapes import Float, Int, Tensor


@dataclass(frozen=True)
class Aux:
    """What sublayers report besides their update. Returned, and summed by the blocks and the stack.

    Attributes:
        losses: Terms to add to the loss, by name, summed over the tokens; terms of one name are summed over the layers.
        loads: How many tokens each expert received, by the name of the routed layer, such as `blocks.3.moe`.
    """

    losses: dict[str, Tensor]
    loads: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def detach(self) -> "Aux":
        """The numbers alone, without what their gradients need."""
        return Aux(*({name: x.detach() for name, x in each.items()} for each in (self.losses, self.loads)))


def merge(a: Aux | None, b: Aux | None) -> Aux | None:
    """The sum of two reports."""
    if a is None or b is None:
        return b if a is None else a
    return Aux(_sum(a.losses, b.losses), _sum(a.loads, b.loads))


def _sum(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return a | {name: a[name] + x if name in a else x for name, x in b.items()}


class Sublayer(Configured, nn.Module, ABC):
    """Base of attention, FFN and whatever else updates the stream.

    It works alone, without a stack around it: `update, aux = sublayer(x)` takes each row of x as one full sequence.
    """

    def __init__(self, config: "SublayerConfig") -> None:
        super().__init__()
        self.dropout = config.dropout

    @final
    def forward(
        self, x: Float[Tensor, "B T D"], ctx: Context | None = None
    ) -> tuple[Float[Tensor, "B T D"], Aux | None]:
        """The update to the stream, after residual dropout, and the report if there is one."""
        update, aux = self.update(x, ctx)
        return F.dropout(update, self.dropout, self.training) if self.dropout else update, aux

    @abstractmethod
    def update(self, x: Float[Tensor, "B T D"], ctx: Context | None) -> tuple[Float[Tensor, "B T D"], Aux | None]:
        """The update without dropout. `ctx` is None outside a stack."""

    @abstractmethod
    def residual_weights(self) -> list[Tensor]:
        """The weights that write to the stream; initialisation may scale them down with depth."""

    @abstractmethod
    def flops(self, n_keys: int) -> int:
        """Floating-point operations for one token's forward pass, its queries reading `n_keys` keys."""

    def after_step(self, load: Tensor) -> None:
        """Called in training after the optimiser's step, with what the sublayer reported as its load; does nothing."""

    def slices(self) -> dict[str, dict[str, Int[Tensor, " rows"]]]:
        """What adapters may sit on: for each projection, the rows of its named slices (`q`, `up`, …)."""
        return {}


def in_turn(n_groups: int, **widths: int) -> dict[str, Int[Tensor, " rows"]]:
    """The rows of slices that take turns: in each of `n_groups` groups, so many rows of each."""
    rows = torch.arange(n_groups * sum(widths.values()), device="cpu").view(n_groups, -1)
    return {name: part.flatten() for name, part in zip(widths, rows.split(list(widths.values()), 1), strict=True)}


@config
class SublayerConfig(Config, ABC):
    """Base of the configs of sublayers.

    Attributes:
        dropout: Probability that an element of the update is dropped in training (residual dropout).
    """

    name: ClassVar[str]
    """What the sublayer is called among the parameters of its block."""

    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must be at least 0 and below 1")

    def build(self, d_model: int) -> Sublayer:
        """The sublayer for a stream of width `d_model`."""
        return self._build(d_model)
