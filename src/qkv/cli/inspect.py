"""`qkv inspect`."""

from pathlib import Path


def inspect(model: Path, text: str, /, *, translation: str | None = None, out: Path = Path("alignment.png")) -> None:
    """Draw which tokens of a text its translation looked at.

    Args:
        model: A run folder, or a model of the package transly; with attention.
        text: What is translated.
        translation: Whose attention to draw. By default the model's own.
        out: The picture.
    """
    from qkv.inspect import draw_alignment
    from qkv.translator import load_translator

    alignment = load_translator(model).align(text, translation)
    draw_alignment(alignment, out)
    print(f"{text} → {alignment.translation}")
    print(f"the alignment is in {out}")
