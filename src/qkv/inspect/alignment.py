"""Which tokens of a source a translation looked at, as numbers and as a picture."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import final

from qkv.errors import FileError
from qkv.shapes import Float, Tensor

_INCHES_PER_TOKEN = 0.3
_MOST_INCHES = 40.0


@final
@dataclass(frozen=True)
class Alignment:
    """Where a translation looked.

    Attributes:
        source: The tokens of the source, as text; empty where a model adds places of its own.
        target: Those of the target, its end the last.
        weights: Of each target token over the source; a row sums to 1.
        translation: The target as a text.
    """

    source: tuple[str, ...]
    target: tuple[str, ...]
    weights: Float[Tensor, "T S"]
    translation: str


def draw_alignment(alignment: Alignment, path: Path, *, title: str = "") -> None:
    """A heat map: the source from left to right, the target from top to bottom, dark where the weight is near 1.

    Args:
        alignment: What to draw.
        path: The picture; its ending says which kind, `.png` or what else matplotlib knows.
        title: Above it.

    Raises:
        FileError: matplotlib is not installed, or the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FileError(f'{path}: drawing needs matplotlib; pip install "qkv[plot]"') from None
    rows, columns = alignment.weights.shape
    size = [min(_MOST_INCHES, 1.5 + _INCHES_PER_TOKEN * n) for n in (columns, rows)]
    figure = Figure(figsize=(size[0] + 0.8, size[1]), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(alignment.weights.float().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="equal")
    axes.set_xticks(range(columns), [_shown(token) for token in alignment.source])
    axes.set_yticks(range(rows), [_shown(token) for token in alignment.target])
    axes.xaxis.tick_top()
    if max(map(len, alignment.source), default=0) > 2:
        axes.tick_params(axis="x", rotation=60)
    if title:
        axes.set_title(title)
    figure.colorbar(picture, ax=axes, label="weight", shrink=0.8)
    _write(figure, path)


def _write(figure: object, path: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            figure.savefig(path, dpi=150)  # type: ignore[attr-defined]
        except (OSError, ValueError) as error:
            raise FileError(f"{path}: cannot be written ({error}); choose another --out") from None
    if any("lyph" in str(warning.message) for warning in seen):
        warnings.warn(f"{path}: the fonts here lack some of the characters; install one that has them", stacklevel=2)


def _shown(token: str) -> str:
    """A token that can be seen; `$` would begin a formula."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("$", r"\$")
