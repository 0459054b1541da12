"""Families of models as Hugging Face lays them out: one file each, a reader of the config and a map of the keys."""

from qkv.checkpoints.families.family import Family
from qkv.checkpoints.families.gpt2 import GPT2
from qkv.checkpoints.families.llama import LLAMA

FAMILIES: dict[str, Family] = {"gpt2": GPT2, "llama": LLAMA}
"""By the `model_type` of `config.json`."""

__all__ = ["FAMILIES", "Family"]
