"""Families of models in the layout of Hugging Face: one file each, with a reader of its config and a map of its keys."""

from qkv.checkpoints.families.family import Family
from qkv.checkpoints.families.gpt2 import GPT2
from qkv.checkpoints.families.llama import LLAMA

FAMILIES: dict[str, Family] = {"gpt2": GPT2, "llama": LLAMA}
"""By the `model_type` of `config.json`."""

__all__ = ["FAMILIES", "Family"]
