"""Weights and training state on disk: safetensors, whole-or-nothing checkpoints, maps to foreign models."""

from qkv.checkpoints.maps import build_empty, check_fit
from qkv.checkpoints.store import Checkpoint, Store
from qkv.checkpoints.tensors import digest, read_folder, read_tensors, write_tensors

__all__ = ["Checkpoint", "Store", "build_empty", "check_fit", "digest", "read_folder", "read_tensors", "write_tensors"]
