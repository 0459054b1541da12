"""Which tokens of a source a translation looked at, as numbers and as a picture."""

import math
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

from qkv.errors import FileError
from qkv.shapes import Float, Tensor

_INCHES_PER_TOKEN = 0.3
_MOST_INCHES = 40.0  # beyond it, some of the tokens have no label
_KINDS = frozenset({".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp"})


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
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FileError(f'{path}: drawing needs matplotlib; pip install "qkv[plot]"') from None
    rows, columns = alignment.weights.shape
    if path.suffix.lower() not in _KINDS:
        raise FileError(f"{path}: its ending does not say what kind of picture; name it {path.name or 'alignment'}.png")
    inches = [min(_MOST_INCHES, _INCHES_PER_TOKEN * n) for n in (columns, rows)]
    figure = Figure(figsize=(inches[0] + 2.3, inches[1] + 1.5), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(alignment.weights.float().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="equal")
    across, down = (math.ceil(n * _INCHES_PER_TOKEN / _MOST_INCHES) for n in (columns, rows))
    axes.set_xticks(range(0, columns, across), [_shown(token) for token in alignment.source[::across]])
    axes.set_yticks(range(0, rows, down), [_shown(token) for token in alignment.target[::down]])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set(xlabel="read", ylabel="written")
    if max(map(len, alignment.source), default=0) > 2:
        axes.tick_params(axis="x", rotation=60)
    if title:
        axes.set_title(title)
    figure.colorbar(picture, ax=axes, label="weight", shrink=0.8)
    families = _families("".join((*alignment.source, *alignment.target)))
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_fontfamily(families)
    _write(figure, path)


@cache
def _families(text: str) -> list[str]:
    """The usual font, and of what is installed those that have what it lacks of a text."""
    from matplotlib import font_manager, ft2font, rcParams

    def has(path: str) -> set[str]:
        try:
            font = ft2font.FT2Font(path)
        except (RuntimeError, OSError):  # damaged, or of a kind that matplotlib does not read
            return set()
        return {character for character in missing if font.get_char_index(ord(character))}

    usual = list(rcParams["font.family"])
    missing = {c for c in text if not c.isspace() and c.isprintable()}
    missing -= has(font_manager.findfont(font_manager.FontProperties(family=usual)))
    for font in font_manager.fontManager.ttflist if missing else ():
        if "Last Resort" not in font.name and (found := has(font.fname)):  # that one has a box for every character
            usual.append(font.name)
            missing -= found
        if not missing:
            break
    return usual


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
