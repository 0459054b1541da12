"""Text from a model: sampling, token by token, continuous batching, beam search, and how likely a text is."""

from qkv.generation.beam import BeamConfig, Hypothesis, beam_search
from qkv.generation.engine import Engine, Finish, Row
from qkv.generation.generate import Kept, Step, generate, search
from qkv.generation.sampling import USUAL, SamplingConfig, next_ids, row_generators
from qkv.generation.scoring import score
from qkv.generation.stops import StopFilter

__all__ = [
    "USUAL",
    "BeamConfig",
    "Engine",
    "Finish",
    "Hypothesis",
    "Kept",
    "Row",
    "SamplingConfig",
    "Step",
    "StopFilter",
    "beam_search",
    "generate",
    "next_ids",
    "row_generators",
    "score",
    "search",
]
