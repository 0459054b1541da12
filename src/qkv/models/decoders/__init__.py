"""The decoders of the recurrent translator: with attention on the last state, on the current one, and without."""

from qkv.models.decoders.bahdanau import BahdanauConfig
from qkv.models.decoders.decoder import Decoder, DecoderConfig, DecoderState
from qkv.models.decoders.fixed_vector import FixedVector, FixedVectorConfig
from qkv.models.decoders.luong import LuongConfig

__all__ = [
    "BahdanauConfig",
    "Decoder",
    "DecoderConfig",
    "DecoderState",
    "FixedVector",
    "FixedVectorConfig",
    "LuongConfig",
]
