"""`qkv inspect`."""

from itertools import count
from pathlib import Path


def inspect(model: Path, text: str, /, *, translation: str | None = None, out: Path | None = None) -> None:
    """Draw which tokens of a text its translation looked at.

    Args:
        model: A run folder, or a model of the package transly; with attention.
        text: What is translated.
        translation: Whose attention to draw. By default the model's own.
        out: The picture. By default alignment.png, or the next of that name with a number that is free.
    """
    from qkv.inspect import draw_alignment
    from qkv.loading.layouts import load_as
    from qkv.loading.translator import Translator
    from qkv.yaml_files import expand_home

    alignment = load_as(Translator, model).align(text, translation)
    out = _free() if out is None else expand_home(out)
    draw_alignment(alignment, out)
    print(f"{text} → {alignment.translation}")
    print(f"the alignment is in {out}")


def _free() -> Path:
    names = (Path(f"alignment-{n}.png" if n > 1 else "alignment.png") for n in count(1))
    return next(name for name in names if not name.exists())
