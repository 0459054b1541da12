"""Text from a model: sampling, and generation token by token with a cache."""

from qkv.generation.generate import Finish, Kept, Step, context_of, generate
from qkv.generation.sampling import SamplingConfig, next_ids, row_generators
from qkv.generation.stops import StopFilter

__all__ = [
    "Finish",
    "Kept",
    "SamplingConfig",
    "Step",
    "StopFilter",
    "context_of",
    "generate",
    "next_ids",
    "row_generators",
]
