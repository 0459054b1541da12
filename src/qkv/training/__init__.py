"""Training: a recipe in, a run folder out."""

from qkv.training.evaluate import evaluate_model
from qkv.training.optimizer import AdamWConfig
from qkv.training.recipe import RecipeConfig, StartConfig
from qkv.training.recipe_files import read_recipe
from qkv.training.schedule import CosineConfig, ScheduleConfig, WSDConfig
from qkv.training.start import train
