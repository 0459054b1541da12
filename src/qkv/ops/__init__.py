"""The mathematics: attention, rotary embedding and the loss, as functions of tensors."""

from qkv.ops.attend import attend, kernels_used
from qkv.ops.loss import linear_cross_entropy
from qkv.ops.reference import attention_weights, reference_attention
from qkv.ops.rotary import Rotation, rotate

__all__ = [
    "Rotation",
    "attend",
    "attention_weights",
    "kernels_used",
    "linear_cross_entropy",
    "reference_attention",
    "rotate",
]
