"""Activation functions by name."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F

from qkv.shapes import Tensor

ActivationName = Literal[
    "gelu", "gelu_tanh", "relu", "relu_squared", "sigmoid", "silu", "tanh", "identity", "quick_gelu"
]

ACTIVATIONS: dict[ActivationName, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
"""`gelu` is x Φ(x), `gelu_tanh` its approximation in Hendrycks and Gimpel 2016 (GPT-2 uses it), `silu` is Swish;
`quick_gelu` is another approximation, x σ(1.702 x) (CLIP)."""
