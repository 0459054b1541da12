"""What the pictures of attention have in common: their axes, their fonts, their files."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, final

from qkv.errors import FileError
from qkv.shapes import Float, Tensor


@final
class Inspection(NamedTuple):
    """What `qkv inspect` found.

    Attributes:
        name: What the picture is called, if nobody says.
        says: It in a line.
        draw: Writes the picture to a path.
    """

    name: str
    says: str
    draw: Callable[[Path], None]


INCHES_PER_TOKEN = 0.3
MOST_INCHES = 40.0  # beyond it, some of the tokens have no label
_KINDS = frozenset({".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp"})


def figure_of(path: Path, inches: tuple[float, float]) -> Any:
    """An empty figure for a file.

    Raises:
        FileError: matplotlib is not installed, or the ending does not say what kind of picture it is.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FileError(f'{path}: drawing needs matplotlib; pip install "qkv[plot]"') from None
    if path.suffix.lower() not in _KINDS:
        raise FileError(f"{path}: its ending does not say what kind of picture; name it {path.name or 'picture'}.png")
    return Figure(figsize=inches, layout="constrained")


def heat(
    axes: Any,
    weights: Float[Tensor, "rows columns"],
    down: Sequence[str],
    across: Sequence[str],
    *,
    xlabel: str,
    ylabel: str,
) -> Any:
    """A matrix with its tokens at the sides, dark where a weight is near 1; what matplotlib makes a colour bar of."""
    picture = axes.imshow(weights.float().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="equal")
    x, y = (math.ceil(len(names) * INCHES_PER_TOKEN / MOST_INCHES) for names in (across, down))
    axes.set_xticks(range(0, len(across), x), [_shown(token) for token in across[::x]])
    axes.set_yticks(range(0, len(down), y), [_shown(token) for token in down[::y]])
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if max(map(len, across), default=0) > 2:
        axes.tick_params(axis="x", rotation=60)
    families = _families("".join((*across, *down)))
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_fontfamily(families)
    return picture


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


def write(figure: Any, path: Path) -> None:
    """Write the file. Raises `FileError` where it cannot be written."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise FileError(f"{path}: cannot be written ({error}); choose another --out") from None
    if any("lyph" in str(warning.message) for warning in seen):
        warnings.warn(f"{path}: the fonts here lack some of the characters; install one that has them", stacklevel=2)


def _shown(token: str) -> str:
    """A token that can be seen; `$` would begin a formula."""
    return token.replace(" ", "␣").replace("\n", "↵").replace("$", r"\$")
