"""Formats of the files with our own weights: what changed from one to the next, and the way between them."""

import re
from collections.abc import Mapping

import torch

from qkv.checkpoints.maps import fuse_glu
from qkv.checkpoints.tensors import digest
from qkv.shapes import Tensor

FORMAT = 2
"""1: `gate_up_proj` of a GLU holds the whole gate, then all values. 2: they take turns, as in `qkv.nn.ffn.GLU`."""

_GLU = re.compile(r"(.*\.)?gate_up_proj\.(weight|bias)")  # of a model, or the moments of an optimiser


def from_format(number: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of that format, as this version has them."""
    assert 1 <= number <= FORMAT
    if number == FORMAT:
        return tensors
    return {name: _in_turn(tensor) if _is_glu(name, tensor) else tensor for name, tensor in tensors.items()}


def digest_of_base(state: Mapping[str, Tensor]) -> str:
    """What adapters know their base by: the digest of format 1, so that older ones still know it."""
    return digest(state, lambda name, tensor: _apart(tensor) if _is_glu(name, tensor) else tensor)


def _is_glu(name: str, tensor: Tensor) -> bool:
    if _GLU.fullmatch(name) is None or tensor.ndim == 0:  # an optimiser's counter of steps has no rows
        return False
    return len(tensor) > 0 and len(tensor) % 2 == 0  # `check_fit` refuses the others


def _in_turn(rows: Tensor) -> Tensor:
    d_ff = len(rows) // 2
    return fuse_glu(d_ff).forward(rows.split(d_ff))[0]


def _apart(rows: Tensor) -> Tensor:
    return torch.cat(fuse_glu(len(rows) // 2).inverse((rows,)))
