"""What the reader and the writer of GGUF files share: kinds of tensors, types of values, limits.

Source: ggml's `ggml-common.h`, `ggml.h` and `docs/gguf.md` (https://github.com/ggml-org/ggml).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import torch

from qkv.checkpoints.files import MAX_COUNT
from qkv.shapes import Tensor

MAX_AXES: Final = 4
STRING, ARRAY = 8, 9
NUMBERS: Final[dict[int, np.dtype]] = {
    code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))
} | {10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8")}
"""The types of metadata by their number in the format."""


@final
@dataclass(frozen=True)
class Kind:
    """How the numbers of a tensor lie in the file.

    Attributes:
        code: Its number in the format.
        block: Numbers that are stored together; a row is a whole number of blocks.
        size: Bytes of a block.
        dtype: What the numbers are where they are plain; None for quantised blocks, which are handed on as bytes.
    """

    code: int
    block: int
    size: int
    dtype: torch.dtype | None = None

    def stored(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor as we hold it: that of the numbers, or rows of bytes for blocks."""
        return tuple(shape) if self.dtype else (*shape[:-1], shape[-1] // self.block * self.size)

    def shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """The shape of the numbers from that of the tensor as we hold it."""
        return tuple(stored) if self.dtype else (*stored[:-1], stored[-1] // self.size * self.block)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes that a tensor of this shape takes."""
        return math.prod(shape) // self.block * self.size

    def check(self, shape: Sequence[int], what: str) -> None:
        """Refuse the shape of a tensor that a file cannot hold.

        Raises:
            ValueError: It is none; the message begins with `what`.
        """
        if not 1 <= len(shape) <= MAX_AXES:
            raise ValueError(f"{what} has {len(shape)} axes, a tensor 1 to {MAX_AXES}")
        if min(shape) < 1 or math.prod(shape) > MAX_COUNT:
            raise ValueError(f"{what} has the impossible shape {tuple(shape)}")
        if shape[-1] % self.block:
            raise ValueError(f"{what} has rows of {shape[-1]}, not a multiple of its blocks of {self.block}")


KINDS: Final[dict[str, Kind]] = {
    "F32": Kind(0, 1, 4, torch.float32),
    "F16": Kind(1, 1, 2, torch.float16),
    "BF16": Kind(30, 1, 2, torch.bfloat16),
    "Q4_0": Kind(2, 32, 18),
    "Q4_1": Kind(3, 32, 20),
    "Q5_0": Kind(6, 32, 22),
    "Q5_1": Kind(7, 32, 24),
    "Q8_0": Kind(8, 32, 34),
    "Q4_K": Kind(12, 256, 144),
    "Q6_K": Kind(14, 256, 210),
}
"""What qkv reads."""

NAMES: Final[dict[int, str]] = {kind.code: name for name, kind in KINDS.items()}

OTHERS: Final[dict[int, str]] = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""What it does not, so that an error can name it."""


@final
@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file.

    Attributes:
        kind: A name from `KINDS`.
        shape: Of the numbers, in the order of torch: rows, columns.
        data: Memory-mapped. Plain numbers in their dtype and `shape`; blocks as uint8, (rows, bytes of a row), so that
            rows can be moved about before they are expanded. Writing into it never changes the file.
    """

    kind: str
    shape: tuple[int, ...]
    data: Tensor


def alignment_of(metadata: Mapping[str, Any]) -> int:
    """Where tensors begin: at multiples of so many bytes.

    Raises:
        ValueError: It is none that the format allows.
    """
    found = metadata.get("general.alignment", 32)
    if type(found) is not int or not 8 <= found <= 1 << 20 or found & (found - 1):
        raise ValueError(f"general.alignment is {found!a} and must be a power of two from 8 to {1 << 20}")
    return found
