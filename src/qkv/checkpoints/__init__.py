"""Weights and training state on disk: safetensors, whole-or-nothing checkpoints, maps to foreign models."""

from qkv.checkpoints.maps import (
    Fuse,
    FuseInTurn,
    KeyMap,
    Operation,
    Permute,
    Rule,
    Split,
    Stack,
    Transpose,
    check_depth,
    check_fit,
    fuse_glu,
    fuse_qkv,
)
from qkv.checkpoints.store import Checkpoint, Store
from qkv.checkpoints.tensors import digest, read_folder, read_tensors, write_tensors

__all__ = [
    "Checkpoint",
    "Fuse",
    "FuseInTurn",
    "KeyMap",
    "Operation",
    "Permute",
    "Rule",
    "Split",
    "Stack",
    "Store",
    "Transpose",
    "check_depth",
    "check_fit",
    "digest",
    "fuse_glu",
    "fuse_qkv",
    "read_folder",
    "read_tensors",
    "write_tensors",
]
