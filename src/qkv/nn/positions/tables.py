"""Tables of positions, which are added to the embeddings: learned and sinusoidal."""

from abc import ABC, abstractmethod
from typing import Annotated, final

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import Config, Configured, Count, config, must
from qkv.errors import ConfigError
from qkv.ops.rotary import frequencies
from qkv.shapes import Bool, Float, Int, Tensor
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


def _cells(tokens: Tokens) -> tuple[Int[Tensor, "B T 2"], Bool[Tensor, "B T"]]:
    """Row and column of each token, and which have no place; `ConfigError` where their coordinates are not two."""
    if (n := tokens.coords.shape[-1]) != 2:
        raise ConfigError(
            f"positions are of rows and columns and the tokens have {n} coordinate each; give Tokens.pictures(grids)"
        )
    return tokens.coords, (tokens.coords < 0).all(-1)


@final
@config
class LearnedGridConfig(PositionTableConfig):
    """One trained vector for each place of a grid of patches (Dosovitskiy et al. 2021, section 3.1).

    Attributes:
        rows, columns: Of the largest picture, in patches.
    """

    rows: Count
    columns: Count

    @property
    def max_length(self) -> int:
        return self.rows * self.columns

    def describe(self) -> str:
        return f"a vector for each place of {self.rows} rows and {self.columns} columns"


@final
class LearnedGrid(PositionTable, config=LearnedGridConfig):
    """A trained table, row by row."""

    def __init__(self, config: LearnedGridConfig, d_model: int) -> None:
        super().__init__()
        self.rows, self.columns = config.rows, config.columns
        self.weight = nn.Parameter(torch.empty(config.rows * config.columns, d_model))

    def forward(self, tokens: Tokens, dtype: torch.dtype) -> Float[Tensor, "B T D"]:
        """The vectors of these rows and columns, and 0 for tokens that have none.

        Raises:
            ConfigError: There is no such place (on CPUs).
        """
        cells, none = _cells(tokens)
        row, column = cells.unbind(-1)
        there = (column >= 0) & (column < self.columns)  # a column too many would be the next row's first
        try:
            place = torch.where(there, row * self.columns + column, -1).masked_fill(none, 0)
            vectors = F.embedding(place, self.weight)
        except IndexError:
            raise ConfigError(
                f"a patch in row {int(row.max())} or column {int(column.max())} does not fit a table of {self.rows} "
                f"rows and {self.columns} columns, which count from 0; give smaller pictures"
            ) from None
        return vectors.to(dtype).masked_fill(none[..., None], 0)


@final
@config
class SinusoidalGridConfig(PositionTableConfig):
    """sin, then cos of the column in the first half of a vector and of the row in the second, for pictures of any size.

    Source: Chen et al. 2021 (MoCo v3), section 4; He et al. 2022 (MAE).
    """

    base: float = 10_000.0

    def describe(self) -> str:
        return "sines and cosines of row and column"


@final
class SinusoidalGrid(PositionTable, config=SinusoidalGridConfig):
    """A table that is computed and has no weights."""

    def __init__(self, config: SinusoidalGridConfig, d_model: int) -> None:
        super().__init__()
        if d_model % 4:
            raise ConfigError(f"d_model={d_model} must be a multiple of 4 for sines and cosines of row and column")
        self.base, self.d_model = config.base, d_model

    def forward(self, tokens: Tokens, dtype: torch.dtype) -> Float[Tensor, "B T D"]:
        """The vectors of these rows and columns, 0 for tokens without; the angles are computed in float64."""
        cells, none = _cells(tokens)
        angle = cells.flip(-1)[..., None] * frequencies(self.base, self.d_model // 2, cells.device)  # column, row
        vectors = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2).to(dtype)
        return vectors.masked_fill(none[..., None], 0)
