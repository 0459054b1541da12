"""The kinds of tensors in a GGUF file: plain numbers, or blocks of quantised ones.

Source: ggml's `ggml-common.h` and `ggml.h` (https://github.com/ggml-org/ggml).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch


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
