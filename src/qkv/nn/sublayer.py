"""What stands on the residual stream: a sublayer maps the stream to an update, whatever it does inside."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
import torch.nn.functional as F

from qkv.config import Config, Share, config
from qkv.context import Context, Memory
from qkv.errors import ConfigError
from qkv.masks import Mask
from qkv.nn.part import Part
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import Tokens, placed


@dataclass(frozen=True)
class Aux:
    """What sublayers report besides their update. Returned, and summed by the blocks and the stack.

    A sublayer gives each entry a plain name, such as `balance`. The block and the stack put its place in front, as in
    `blocks.3.moe.balance`, so that layers stay apart. Applications of one layer are summed, and so are batches.

    Attributes:
        losses: Terms to add to the loss, each summed over the tokens like the loss of the head.
        loads: How many tokens each expert received.
    """

    losses: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    loads: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def under(self, place: str) -> "Aux":
        """The same with a place in front of the names."""
        return Aux(*({f"{place}.{name}": x for name, x in each.items()} for each in (self.losses, self.loads)))

    def detach(self) -> "Aux":
        """The numbers alone, without what their gradients need."""
        return Aux(*({name: x.detach() for name, x in each.items()} for each in (self.losses, self.loads)))


def merge(a: Aux | None, b: Aux | None) -> Aux | None:
    """The sum of two reports, name by name."""
    if a is None or b is None:
        return b if a is None else a
    return Aux(_sum(a.losses, b.losses), _sum(a.loads, b.loads))


def _sum(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return a | {name: a[name] + x if name in a else x for name, x in b.items()}


class Sublayer(Part, ABC):
    """Base of attention, FFN and whatever else updates the stream.

    It works alone, without a stack around it: `update, aux = sublayer(x)` takes each row of x as one full sequence,
    `sublayer(x, Tokens.padded(lengths))` texts as they are, and cross-attention its `memory`.
    """

    def __init__(self, config: "SublayerConfig") -> None:
        super().__init__()
        self.dropout = config.dropout

    @final
    def forward(
        self,
        x: Float[Tensor, "B T D"],
        ctx: Context | Tokens | None = None,
        *,
        memory: Memory | Float[Tensor, "B S M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Aux | None]:
        """The update to the stream, after residual dropout, and the report if there is one.

        Args:
            x: The stream.
            ctx: From a stack; or, for a layer alone, where the tokens stand (None: one full sequence per row).
            memory: What cross-attention reads, for a layer alone.

        Raises:
            ConfigError: What is given does not fit together.
        """
        if not isinstance(ctx, Context):
            if x.dim() != 3:
                raise ConfigError(f"a layer reads (B, T, D) and was given {tuple(x.shape)}; give one text as x[None]")
            ctx = self.alone(x, placed(x, ctx), Memory.of(memory))
        update, aux = self.update(x, ctx)
        return F.dropout(update, self.dropout, self.training) if self.dropout else update, aux

    @abstractmethod
    def update(self, x: Float[Tensor, "B T D"], ctx: Context) -> tuple[Float[Tensor, "B T D"], Aux | None]:
        """The update without dropout."""

    def alone(self, x: Float[Tensor, "B T D"], tokens: Tokens, memory: Memory | None) -> Context:
        """The context of this layer without a stack around it."""
        return Context(tokens, (), memory=memory)

    @abstractmethod
    def residual_weights(self) -> list[Tensor]:
        """The weights that write to the stream; initialisation may scale them down with depth."""

    def flops(self, n_keys: int) -> int:
        """Floating-point operations for one token's forward pass, its queries reading `n_keys` keys."""
        return self.matrix_flops()

    def attends(self) -> Mask | None:
        """The mask of the keys that its queries read; None: no token reads another by attention."""
        return None

    def cached(self) -> int:
        """Numbers that a cache keeps of each token."""
        return 0

    def state_size(self, d_model: int) -> int:
        """Numbers that a cache keeps of a text, however long it is."""
        return 0

    def after_step(self, loads: Mapping[str, Tensor]) -> None:
        """Called in training after the optimiser's step, with the loads that the sublayer reported; does nothing."""

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

    reads_memory: ClassVar[bool] = False
    """Whether it reads the context's memory, such as an encoder's output."""

    dropout: Share = 0.0

    @property
    def stream_mask(self) -> Mask | None:
        """Which tokens of the stream a token reads; None: no other, or none after it."""
        return None

    def notes(self, d_model: int) -> list[str]:
        """What a drawing says beside it, in a few short lines."""
        return [self.describe()]

    def build(self, d_model: int) -> Sublayer:
        """The sublayer for a stream of width `d_model`."""
        return self._build(d_model)
