"""Tables of positions, which are added to the embeddings: learned and sinusoidal."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, final

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import Config, Configured, Count, Share, config, must
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


def cells_of(tokens: Tokens) -> tuple[Int[Tensor, "B T 2"], Bool[Tensor, "B T"]]:
    """Row and column of each token, and which have no place; `ConfigError` where their coordinates are not two."""
    if (n := tokens.coords.shape[-1]) != 2:
        raise ConfigError(
            f"positions are of rows and columns and the tokens have {n} coordinate each; give Tokens.pictures(grids)"
        )
    return tokens.coords, (tokens.coords < 0).all(-1) | ~tokens.valid


@final
@config
class GridResizeConfig(Config):
    """How the grid of a picture's positions is made from a trained grid of another size.

    A grid of the trained size is taken as it is.

    Attributes:
        kind: By cubic or linear interpolation, with the corners of the outer cells in the same place.
        antialias: Whether values are averaged where the grid gets smaller.
        offset: Added to the sides of the new grid where the distance of its points is computed, as the code of DINOv2
            does with 0.1.
    """

    kind: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = False
    offset: Share = 0.0


@final
@config
class LearnedGridConfig(PositionTableConfig):
    """One trained vector for each place of a grid of patches (Dosovitskiy et al. 2021, section 3.1).

    Attributes:
        rows, columns: In patches.
        resize: How pictures of other sizes get their positions; None: they lie in the upper left corner, and a larger
            one is refused.
    """

    rows: Count
    columns: Count
    resize: GridResizeConfig | None = None

    @property
    def max_length(self) -> int | None:
        return self.rows * self.columns if self.resize is None else None

    def describe(self) -> str:
        return f"a vector for each place of {self.rows} rows and {self.columns} columns"


@final
class LearnedGrid(PositionTable, config=LearnedGridConfig):
    """A trained table, row by row."""

    def __init__(self, config: LearnedGridConfig, d_model: int) -> None:
        super().__init__()
        self.rows, self.columns, self.resize = config.rows, config.columns, config.resize
        self.weight = nn.Parameter(torch.empty(config.rows * config.columns, d_model))

    def forward(self, tokens: Tokens, dtype: torch.dtype) -> Float[Tensor, "B T D"]:
        """The vectors of these rows and columns, and 0 for tokens that have none.

        Raises:
            ConfigError: There is no such place (on CPUs).
        """
        cells, none = cells_of(tokens)
        row, column = cells.unbind(-1)
        table, start, columns = (self.weight, 0, self.columns) if self.resize is None else self._fitted(tokens)
        there = (column >= 0) & (column < columns)  # a column too many would be the next row's first
        try:
            vectors = F.embedding(torch.where(there, start + row * columns + column, -1).masked_fill(none, 0), table)
        except IndexError:
            raise ConfigError(
                f"a patch in row {int(row.max())} or column {int(column.max())} does not fit a table of {self.rows} "
                f"rows and {self.columns} columns, which count from 0; give smaller pictures"
            ) from None
        return vectors.to(dtype).masked_fill(none[..., None], 0)

    def _fitted(self, tokens: Tokens) -> tuple[Float[Tensor, "places D"], Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """The trained table and those of other sizes, one below the other; each token's first place and columns there.

        A table is made once for each size of picture in the batch.
        """
        ends = (tokens.coords + 1) * tokens.valid[..., None]
        rows = torch.arange(len(ends), device=ends.device)[:, None]
        _, document = (tokens.segment + rows * (tokens.shape[1] + 1)).unique(return_inverse=True)
        of_each = document.flatten()[:, None].expand(-1, 2)
        sizes = ends.new_zeros(document.numel(), 2).scatter_reduce(0, of_each, ends.flatten(0, 1), "amax")
        base = int(ends.sum()) + 1  # above all: one number for both, since PyTorch is slow to find rows that differ
        found, which = (sizes[:, 0] * base + sizes[:, 1]).unique(return_inverse=True)
        distinct = torch.stack([found // base, found % base], -1)
        tables, starts = list[Tensor]([self.weight]), list[int]()
        for h, w in distinct.tolist():
            own = (h, w) == (self.rows, self.columns)
            starts.append(0 if own else sum(map(len, tables)))
            tables += [] if own or not h * w else [self._resized(h, w)]
        table = tables[0] if len(tables) == 1 else torch.cat(tables)
        kind = which[document]
        return table, distinct.new_tensor(starts)[kind], distinct[kind, 1]

    def _resized(self, rows: int, columns: int) -> Float[Tensor, "places D"]:
        """The table of a grid of another size, computed in at least float32."""
        assert self.resize is not None
        weight, offset = self.weight, self.resize.offset
        grid = weight.to(torch.promote_types(weight.dtype, torch.float32)).view(1, self.rows, self.columns, -1)
        size: dict[str, Any] = {"size": (rows, columns)}
        if offset:
            size = {"scale_factor": ((rows + offset) / self.rows, (columns + offset) / self.columns)}
        # With the channels together in memory: with the rows together, PyTorch 2.13 makes one column of another height
        # wrongly where it antialiases.
        made = F.interpolate(grid.permute(0, 3, 1, 2), **size, mode=self.resize.kind, antialias=self.resize.antialias)
        return made.permute(0, 2, 3, 1).flatten(0, 2).to(weight.dtype)


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
        cells, none = cells_of(tokens)
        angle = cells.flip(-1)[..., None] * frequencies(self.base, self.d_model // 2, cells.device)  # column, row
        vectors = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2).to(dtype)
        return vectors.masked_fill(none[..., None], 0)
