"""Training: a recipe in, a run folder out."""

from qkv.training.evaluate import evaluate_run
from qkv.training.evaluate_pairs import evaluate_pairs
from qkv.training.recipe import (
    AdamWConfig,
    CosineConfig,
    RecipeConfig,
    SampleConfig,
    ScheduleConfig,
    StartConfig,
    WSDConfig,
    read_recipe,
)
from qkv.training.start import train

__all__ = [
    "AdamWConfig",
    "CosineConfig",
    "RecipeConfig",
    "SampleConfig",
    "ScheduleConfig",
    "StartConfig",
    "WSDConfig",
    "evaluate_pairs",
    "evaluate_run",
    "read_recipe",
    "train",
]
