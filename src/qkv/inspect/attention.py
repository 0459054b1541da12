"""Which tokens a model attends to: of a text a matrix, of a picture the patches, drawn over it."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch

from qkv.errors import ConfigError
from qkv.inspect.drawing import INCHES_PER_TOKEN, MOST_INCHES, figure_of, heat, write
from qkv.ops.backend import Problem
from qkv.ops.reference import weights_of
from qkv.recorder import Recorder
from qkv.shapes import Float, Tensor

Query = Literal["class", "mean"] | tuple[int, int]
_MOST = 4 << 30  # bytes of weights that are kept
_PANEL = 1.7  # inches
_INK = (0.0, 0.27, 0.6)


@final
@dataclass(frozen=True, eq=False)
class AttentionMaps:
    """What the tokens of a text or a picture attended to.

    Attributes:
        tokens: As text; the patches of a picture by `row,column`, and before them `class`, `register 1`, ….
        layers: The names of the layers, from the input up; one that is applied several times is there several times.
        weights: Of each of them, for each head from each token (rows) over all (columns). A row sums to 1, or with
            sinks to less.
        differences: Of each of them the largest between weights times values and what the kernel really put out.
        grid: Rows and columns of patches; None: a text.
        pixels: The picture as the model read it, from 0 to 1; None: a text.
    """

    tokens: tuple[str, ...]
    layers: tuple[str, ...]
    weights: tuple[Float[Tensor, "H T T"], ...]
    differences: tuple[float, ...]
    grid: tuple[int, int] | None = None
    pixels: Float[Tensor, "C height width"] | None = None

    @property
    def usual_query(self) -> Query:
        """The class token, where there is one; else the mean."""
        return "class" if self.grid is not None and len(self.tokens) > self.grid[0] * self.grid[1] else "mean"

    def rollout(self) -> Float[Tensor, "T T"]:
        """Weights of all layers in a row, half of each step staying where it is (Abnar and Zuidema 2020, section 3).

        The mean of the heads is taken. It says where information could flow, and is no explanation of an answer.
        """
        whole = torch.eye(len(self.tokens))
        for weights in self.weights:
            whole = (weights.float().mean(0) + torch.eye(len(whole))) / 2 @ whole
        return whole

    def over_picture(self, weights: Float[Tensor, "T T"], query: Query | None = None) -> Float[Tensor, "rows columns"]:
        """The weights over the patches of a picture.

        Args:
            weights: Of a head, a mean of heads, or a rollout.
            query: From where: the `class` token, the `mean` of all tokens, or the patch in (row, column), which count
                from 0. None: the class token, if there is one, else the mean.

        Raises:
            ConfigError: It is no picture, or there is no such token.
        """
        if self.grid is None:
            raise ConfigError("the input is a text and has no patches; leave query out, or give a picture")
        rows, columns = self.grid
        prefix = len(self.tokens) - rows * columns
        query = query or self.usual_query
        if query == "class" and not prefix:
            raise ConfigError("the model has no class token; give query='mean', or the row and column of a patch")
        if isinstance(query, tuple) and not (0 <= query[0] < rows and 0 <= query[1] < columns):
            raise ConfigError(f"query={query} is outside of {rows} rows and {columns} columns, which count from 0")
        if query == "mean":
            row = weights.mean(0)
        else:
            row = weights[0 if query == "class" else prefix + query[0] * columns + query[1]]
        return row[prefix:].view(rows, columns)


@final
class AttentionRecorder(Recorder):
    """Keeps the weights of every attention, and how well they explain what its kernel put out.

    Args:
        layers: The numbers of those to keep, counted from 0; None: all.

    Raises:
        ConfigError: They would take more than a few GiB.
    """

    def __init__(self, layers: Collection[int] | None = None) -> None:
        self._only, self._seen, self._bytes = layers, 0, 0
        self.names, self.weights, self.differences = list[str](), list[Tensor](), list[float]()

    def attention(self, name: str, problem: Problem, out: Float[Tensor, "B H T v"]) -> None:
        """Of a batch of one row."""
        number, self._seen = self._seen, self._seen + 1
        if self._only is not None and number not in self._only:
            return
        problem = problem.without_padding()
        heads, length = problem.q.shape[1:3]
        self._bytes += 4 * heads * length**2
        if self._bytes > _MOST:
            raise ConfigError(f"the weights of {length:,} tokens take more than {_MOST >> 30} GiB; give fewer layers")
        weights = weights_of(problem).float()
        values = problem.v.float().repeat_interleave(heads // problem.v.shape[1], dim=1)
        self.names.append(name)
        self.weights.append(weights[0].cpu())
        self.differences.append((weights @ values - out.float()).abs().max().item())


def draw_attention(
    maps: AttentionMaps,
    path: Path,
    *,
    layer: int | None = None,
    head: int | None = None,
    query: Query | None = None,
    rollout: bool = False,
    title: str = "",
) -> None:
    """A panel for each layer (from the top) and head: of a text its matrix, else the picture under the weights.

    The first panel of a layer is the mean of its heads. The largest weight of a panel, which is said above it, is the
    bluest; where there is no blue it is 0.

    Args:
        maps: What to draw.
        path: The picture; its ending says which kind: `.png`, `.pdf`, `.svg`, `.jpg` or `.webp`.
        layer: One of them, counted from 0; None: all.
        head: One of them, counted from 0; None: all and their mean.
        query: From which token of a picture; see `AttentionMaps.over_picture`.
        rollout: Draw that of all layers instead.
        title: Above it.

    Raises:
        ConfigError: There is no such layer, head or token.
        FileError: matplotlib is not installed, the ending says nothing, or the picture cannot be written.
    """
    if query is not None and maps.grid is None:
        raise ConfigError("query is for pictures and the input is a text; leave it out")
    if rollout:
        if layer is not None or head is not None:
            raise ConfigError("a rollout is of all layers and heads; leave layer and head out")
        rows = [("rollout", [("", maps.rollout())])]
    else:
        rows = [_panels(maps, i, head) for i in (range(len(maps.layers)) if layer is None else [layer])]
    several, columns = maps.pixels is not None, max(len(panels) for _, panels in rows)
    named = maps.grid is None and len(rows) == columns == 1
    if named:
        inches = (INCHES_PER_TOKEN * len(maps.tokens) + 2.5,) * 2
    else:
        size = min(_PANEL * (2 if len(rows) == 1 else 1), MOST_INCHES / max(columns + several, len(rows)))
        shape = (1, 1) if maps.pixels is None else maps.pixels.shape[1:]
        inches = size * (columns + several) + 0.4, (size * min(3, shape[0] / shape[1]) + 0.3) * len(rows) + 0.4
    figure = figure_of(path, (min(MOST_INCHES, inches[0]), min(MOST_INCHES, inches[1])))
    grid = figure.add_gridspec(len(rows), columns + several)
    if maps.pixels is not None:
        _picture(figure.add_subplot(grid[0, 0]), maps, query or maps.usual_query)
    for i, (name, panels) in enumerate(rows):
        for j, (says, weights) in enumerate(panels):
            axes = figure.add_subplot(grid[i, j + several])
            if named:
                bar = heat(axes, weights, maps.tokens, maps.tokens, xlabel="looked at", ylabel="from")
                figure.colorbar(bar, ax=axes, label="weight", shrink=0.8)
                title = title or f"{name} {says}".strip(", ")
            else:
                _panel(axes, maps, weights, query, says)
            if j == 0 and not named:
                axes.set_ylabel(name, fontsize=8)
    figure.suptitle(title, fontsize=10)
    write(figure, path)


def _panels(maps: AttentionMaps, layer: int, head: int | None) -> tuple[str, list[tuple[str, Tensor]]]:
    """The name of a layer, and a title and weights for each panel."""
    if not 0 <= layer < len(maps.layers):
        raise ConfigError(f"layer={layer}: there are {len(maps.layers)} layers of attention, which count from 0")
    weights, name = maps.weights[layer], maps.layers[layer].removesuffix(".attention")
    if head is None:
        return name, [("mean, ", weights.mean(0)), *((f"head {i}, ", each) for i, each in enumerate(weights))]
    if not 0 <= head < len(weights):
        raise ConfigError(f"head={head}: layer {layer} has {len(weights)} heads, which count from 0")
    return name, [(f"head {head}, ", weights[head])]


def _panel(axes: Any, maps: AttentionMaps, weights: Tensor, query: Query | None, says: str) -> None:
    shown = weights if maps.pixels is None else maps.over_picture(weights, query)
    axes.set(xticks=[], yticks=[])
    high = max(shown.max().item(), 1e-9)
    axes.set_title(f"{says}up to {high:.2g}", fontsize=7)
    if maps.pixels is None:
        axes.imshow(shown.numpy(), cmap="Blues", vmin=0, vmax=high)
        return
    height, width = maps.pixels.shape[1:]
    extent = (0, width, height, 0)
    axes.imshow(maps.pixels.mean(0).numpy(), cmap="gray", vmin=-1, vmax=1, extent=extent)  # pale
    ink = torch.tensor(_INK).expand(*shown.shape, 3)
    axes.imshow(torch.cat([ink, 0.85 * shown[..., None] / high], -1).numpy(), extent=extent)


def _picture(axes: Any, maps: AttentionMaps, query: Query) -> None:
    """As the model read it, with a frame around the patch that looks."""
    assert maps.pixels is not None
    assert maps.grid is not None
    (rows, columns), (height, width) = maps.grid, maps.pixels.shape[1:]
    pixels = maps.pixels.permute(1, 2, 0)
    axes.imshow(pixels.expand(-1, -1, 3).numpy(), extent=(0, width, height, 0))
    if isinstance(query, tuple):
        (y, x), (h, w) = query, (height / rows, width / columns)
        axes.plot(
            [x * w, (x + 1) * w, (x + 1) * w, x * w, x * w], [y * h, y * h, (y + 1) * h, (y + 1) * h, y * h], "C1"
        )
    axes.set(xticks=[], yticks=[])
    axes.set_title(f"from {query if isinstance(query, str) else '{},{}'.format(*query)}", fontsize=7)


def patch_names(grid: tuple[int, int], prefix: int) -> Iterator[str]:
    """The names of a picture's tokens, as `AttentionMaps` has them."""
    yield from ["class", *(f"register {i}" for i in range(1, prefix))][:prefix]
    yield from (f"{row},{column}" for row in range(grid[0]) for column in range(grid[1]))
