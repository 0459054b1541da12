"""Text from a model: sampling, generation token by token with a cache, and beam search."""

from qkv.generation.beam import BeamConfig, Hypothesis, TextDecoding, beam_search
from qkv.generation.generate import Finish, Kept, Step, context_of, generate
from qkv.generation.sampling import SamplingConfig, next_ids, row_generators
from qkv.generation.stops import StopFilter

__all__ = [
    "BeamConfig",
    "Finish",
    "Hypothesis",
    "Kept",
    "SamplingConfig",
    "Step",
    "StopFilter",
    "TextDecoding",
    "beam_search",
    "context_of",
    "generate",
    "next_ids",
    "row_generators",
]
