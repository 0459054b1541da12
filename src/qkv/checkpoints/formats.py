"""Formats of the files with our own weights: what changed from one to the next, and the way between them."""

import re
from collections.abc import Iterator, Mapping
from typing import final

from qkv.checkpoints.maps import Fuse, fuse_glu
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
    return digest(_InFormat1(state))


def _is_glu(name: str, tensor: Tensor) -> bool:
    if _GLU.fullmatch(name) is None or tensor.ndim == 0:  # an optimiser's counter of steps has no rows
        return False
    return len(tensor) > 0 and len(tensor) % 2 == 0  # `check_fit` refuses the others


def _in_turn(rows: Tensor) -> Tensor:
    d_ff = len(rows) // 2
    (made,) = fuse_glu(d_ff).forward(Fuse((d_ff, d_ff)).inverse((rows,)))
    return made


@final
class _InFormat1(Mapping[str, Tensor]):
    """A view of weights; one at a time is changed, while it is looked at."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._state[name]
        if not _is_glu(name, tensor):
            return tensor
        d_ff = len(tensor) // 2
        (made,) = Fuse((d_ff, d_ff)).forward(fuse_glu(d_ff).inverse((tensor,)))
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)
