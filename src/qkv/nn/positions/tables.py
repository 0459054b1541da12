"""Tables of positions, which are added to the embeddings: learned and sinusoidal."""

from abc import ABC, abstractmethod
from typing import Annotated, final

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import Config, Configured, config, must
from qkv.errors import ConfigError
from qkv.ops.rotary import frequencies
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens


class PositionTable(Configured, nn.Module, ABC):
    """Base of what is added to the embeddings: a vector for each place."""

    @abstractmethod
    def forward(self, tokens: Tokens, dtype: torch.dtype) -> Float[Tensor, "B T D"]:
        """The vectors of the places where these tokens stand: by their index, or their coordinates."""


@config
class PositionTableConfig(Config, ABC):
    """Base of the configs of position tables."""

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest document that it admits; None: any."""
        return None

    def build(self, d_model: int) -> PositionTable:
        """The table for embeddings of width `d_model`."""
        return self._build(d_model)


@final
@config
class LearnedPositionsConfig(PositionTableConfig):
    """One trained vector for each of `length` positions (Gehring et al. 2017; GPT-2, BERT).

    Attributes:
        length: Positions.
        unused: Vectors before them that no token uses, as in RoBERTa, whose positions count from behind the padding's.
    """

    length: int
    unused: Annotated[int, must("not be negative", lambda n: n >= 0)] = 0

    @property
    def max_length(self) -> int:
        return self.length

    def describe(self) -> str:
        return f"a vector for each of {self.length:,} positions"


@final
class LearnedPositions(PositionTable, config=LearnedPositionsConfig):
    """A trained table."""

    def __init__(self, config: LearnedPositionsConfig, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.unused + config.length, d_model))
        self.unused = config.unused

    def forward(self, tokens: Tokens, dtype: torch.dtype) -> Float[Tensor, "B T D"]:
        """The vectors of these indices.

        Raises:
            ConfigError: There is no such index (on CPUs; the stack has checked that none is too large).
        """
        index, table = tokens.index, self.weight[self.unused :]
        try:
            return F.embedding(index, table).to(dtype)  # `table[index]` would take -1 for the last
        except IndexError:
            raise ConfigError(
                f"indices from {int(index.min())} to {int(index.max())} do not fit a table of {len(table)} "
                "positions; an index counts from 0 at the start of its document"
            ) from None


@final
@config
class SinusoidalPositionsConfig(PositionTableConfig):
    """sin and cos of position / base^(2i / D), neighbours in the vector, for any length.

    Source: Vaswani et al. 2017, section 3.5.
    """

    base: float = 10_000.0

    def describe(self) -> str:
        return "sines and cosines of the position"


@final
class SinusoidalPositions(PositionTable, config=SinusoidalPositionsConfig):
    """A table that is computed and has no weights."""

    def __init__(self, config: SinusoidalPositionsConfig, d_model: int) -> None:
        super().__init__()
        if d_model % 2:
            raise ConfigError(f"sinusoidal positions need an even width and d_model={d_model}; make it even")
        self.base, self.d_model = config.base, d_model

    def forward(self, tokens: Tokens, dtype: torch.dtype) -> Float[Tensor, "B T D"]:
        """The vectors of these indices; the angles are computed in float64."""
        angle = tokens.index[..., None] * frequencies(self.base, self.d_model, tokens.index.device)
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2).to(dtype)
