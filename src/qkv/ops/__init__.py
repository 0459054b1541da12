# pyright: reportUnusedImport=false
"""The mathematics: attention, rotary embedding and the loss, as functions of tensors."""

from qkv.ops.attend import BACKENDS, attend, attention_weights, choose, kernels_used, solve
from qkv.ops.backend import Backend, Problem
from qkv.ops.loss import linear_cross_entropy
from qkv.ops.reference import weights_of
from qkv.ops.rotary import Rotation, rotate
from qkv.ops.scores import additive_scores, dot_scores, general_scores, normalised
