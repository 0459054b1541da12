"""Looking inside: what a model attended to."""

from qkv.inspect.alignment import Alignment, draw_alignment

__all__ = ["Alignment", "draw_alignment"]
