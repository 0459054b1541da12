"""Contestants of the training-step benchmark, one file each.

Every file has `build(shape) -> nn.Module`. The module maps (inputs, targets) to the mean cross-entropy, computed in
float32, and its `compile()` does what the library's own training script does.
"""

import importlib

from torch import nn

from peers.shapes import Shape

NAMES = ("qkv", "huggingface", "x_transformers", "litgpt", "nano")


def build(name: str, shape: Shape) -> nn.Module:
    """A contestant in float32, its weights drawn by its own library."""
    return importlib.import_module(f"peers.{name}").build(shape)
