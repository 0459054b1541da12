"""Which tokens of a source a translation looked at, as numbers and as a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import final

from qkv.inspect.drawing import INCHES_PER_TOKEN, MOST_INCHES, figure_of, heat, write
from qkv.shapes import Float, Tensor


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
        path: The picture; its ending says which kind: `.png`, `.pdf`, `.svg`, `.jpg` or `.webp`.
        title: Above it.

    Raises:
        FileError: matplotlib is not installed, the ending says nothing, or the picture cannot be written.
    """
    rows, columns = alignment.weights.shape
    inches = [min(MOST_INCHES, INCHES_PER_TOKEN * n) for n in (columns, rows)]
    figure = figure_of(path, (inches[0] + 2.3, inches[1] + 1.5))
    axes = figure.add_subplot()
    picture = heat(axes, alignment.weights, alignment.target, alignment.source, xlabel="read", ylabel="written")
    if title:
        axes.set_title(title)
    figure.colorbar(picture, ax=axes, label="weight", shrink=0.8)
    write(figure, path)
