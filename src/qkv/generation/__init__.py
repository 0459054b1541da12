"""Text from a model: sampling, token by token, continuous batching, beam search, scores, and forecasts of vectors."""

from qkv.generation.beam import BeamConfig, Hypothesis, beam_search
from qkv.generation.engine import Engine, Finish, Row
from qkv.generation.forecasting import forecast
from qkv.generation.generate import Kept, Step, generate, search
from qkv.generation.sampling import USUAL, SamplingConfig, next_ids, row_generators
from qkv.generation.scoring import score
from qkv.generation.stops import StopFilter
