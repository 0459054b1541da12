"""Looking inside: what a model attended to."""

from qkv.inspect.alignment import Alignment, draw_alignment
from qkv.inspect.attention import AttentionMaps, AttentionRecorder, draw_attention

__all__ = ["Alignment", "AttentionMaps", "AttentionRecorder", "draw_alignment", "draw_attention"]
