"""Heads of a model: the stream to outputs, and the loss that trains them."""

from qkv.nn.heads.embedding import EmbeddingHead, EmbeddingHeadConfig
from qkv.nn.heads.head import Head, HeadConfig
from qkv.nn.heads.lm import LMHead, LMHeadConfig
from qkv.nn.heads.objectives import (
    BinaryCrossEntropyConfig,
    CrossEntropyConfig,
    ObjectiveConfig,
    SquaredErrorConfig,
)
from qkv.nn.heads.pooled import ClassHead, ClassHeadConfig
from qkv.nn.heads.transform import Transform, TransformConfig
from qkv.nn.heads.vector import VectorHead, VectorHeadConfig
