"""Looking inside: what a model attended to."""

from qkv.inspect.alignment import Alignment, draw_alignment
from qkv.inspect.attention import AttentionMaps, AttentionRecorder, draw_attention
from qkv.inspect.drawing import Inspection

__all__ = ["Alignment", "AttentionMaps", "AttentionRecorder", "Inspection", "draw_alignment", "draw_attention"]
