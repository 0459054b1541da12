"""Quantised blocks: numbers from bytes, and bytes from numbers.

A block holds 32 (or 256) numbers of a row: a scale in float16, for some kinds a minimum, and small integers. Each
number is `code * scale + zero`. Both ways are bit for bit those of ggml's reference code (`ggml-quants.c`).
"""

from collections.abc import Callable
from typing import Final

import torch

from qkv.checkpoints.gguf.kinds import KINDS
from qkv.errors import ConfigError
from qkv.shapes import Tensor

CHUNK: Final = 1 << 15
"""Numbers at a time: temporaries stay in the cache, and torch wakes no other core for so few, which costs more."""


def expand(data: Tensor, kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers of a tensor as `GGUFTensor` holds it, (rows, columns).

    Args:
        data: Plain numbers or rows of blocks (uint8).
        kind: A name from `KINDS`.
        dtype: Of the result; computed in float32, then rounded once. Plain numbers of this dtype are not copied.
    """
    if KINDS[kind].dtype:
        return data.to(dtype)
    made = _by_parts(data.reshape(-1, KINDS[kind].size), KINDS[kind].block, dtype, _EXPAND[kind])
    return made.view(KINDS[kind].shape(data.shape))


def quantise(x: Tensor, kind: str) -> Tensor:
    """Rows of blocks (uint8, as `GGUFTensor` holds them) that stand for `x`, (rows, columns), as nearly as `kind` can.

    Raises:
        ConfigError: qkv does not write this kind of block, the rows are not whole blocks, or a number is not finite.
    """
    if kind not in _QUANTISE:
        raise ConfigError(f"qkv does not quantise to {kind}; choose one of {', '.join(_QUANTISE)}")
    block = KINDS[kind].block
    if x.ndim < 1 or x.shape[-1] % block:
        raise ConfigError(f"rows of {x.shape[-1]} are not whole blocks of {block}; {kind} cannot hold them")

    def quantise_part(part: Tensor) -> Tensor:
        if not part.isfinite().all():
            raise ConfigError(f"a weight is not finite, and {kind} cannot hold it; fix the model")
        return _QUANTISE[kind](part.float())

    made = _by_parts(x.detach().reshape(-1, block), KINDS[kind].size, torch.uint8, quantise_part)
    return made.view(KINDS[kind].stored(x.shape))


def _by_parts(rows: Tensor, width: int, dtype: torch.dtype, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of some rows at a time, (rows, width)."""
    made = torch.empty(len(rows), width, dtype=dtype)
    step = CHUNK // max(width, rows.shape[1])
    for i in range(0, len(rows), step):
        made[i : i + step] = function(rows[i : i + step])
    return made


def int4_groups(data: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Four-bit weights as torch's integer products take them, in groups of 32 along a row.

    Args:
        data: (N, bytes of a row), uint8.
        kind: Q4_0, Q4_1 or Q4_K.

    Returns:
        codes (N, K) in uint8 from 0 to 15, scale and zero (N, K / 32) in float32: a weight is exactly
        `code * scale + zero`, product and sum rounded to float32.

    Raises:
        ConfigError: Another kind.
    """
    if kind not in _INT4:
        raise ConfigError(f"{kind} has no four-bit codes with scale and zero; only {', '.join(_INT4)}")
    flat = data.reshape(-1, KINDS[kind].size)
    parts = [_INT4[kind](part) for part in flat.split(CHUNK // KINDS[kind].block)]
    codes, scale, zero = (torch.cat(some).view(len(data), -1) for some in zip(*parts, strict=True))
    return codes, scale, zero


# --- from bytes -----------------------------------------------------------------------------------------------------


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block, in float32, (blocks, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Low halves, then high halves."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """Bit 4 of each of 32 codes, from four bytes."""
    bits = blocks[:, at : at + 4, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(1) << 4


def _int4_k(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eight groups of 32; six-bit scales and minima of groups 4 to 7 have their upper bits with those of 0 to 3."""
    low, minima, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((low & 63, (high & 15) | (low >> 2 & 48)), -1)
    offsets = torch.cat((minima & 63, (high >> 4) | (minima >> 2 & 48)), -1)
    codes = _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).flatten(1)
    return codes, _half(blocks, 0) * scales, -(_half(blocks, 2) * offsets)


def _numbers(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (codes.unflatten(1, (-1, 32)) * scale[..., None] + zero[..., None]).flatten(1)


def _expand_q6_k(blocks: Tensor) -> Tensor:
    """Two halves of 128, each of four rows of 32: four low bits in nibbles, two high bits in a byte of four."""
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64)))  # (blocks, 2, 128)
    high = blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None] & 3
    codes = (low.flatten(1) | high.flatten(1) << 4).to(torch.int8) - 32
    scale = blocks[:, 192:208].contiguous().view(torch.int8) * _half(blocks, 208)  # (blocks, 16)
    return (codes.unflatten(1, (16, 16)) * scale[..., None]).flatten(1)


_INT4: Final[dict[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]] = {
    "Q4_0": lambda blocks: (_nibbles(blocks[:, 2:]), _half(blocks, 0), _half(blocks, 0) * -8),
    "Q4_1": lambda blocks: (_nibbles(blocks[:, 4:]), _half(blocks, 0), _half(blocks, 2)),
    "Q4_K": _int4_k,
}
INT4: Final = frozenset(_INT4)
"""Kinds that `int4_groups` takes."""
_EXPAND: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "Q4_0": lambda blocks: (_nibbles(blocks[:, 2:]).to(torch.int8) - 8) * _half(blocks, 0),  # the zeros have a sign
    "Q4_1": lambda blocks: _numbers(*_INT4["Q4_1"](blocks)),
    "Q4_K": lambda blocks: _numbers(*_int4_k(blocks)),
    "Q5_0": lambda blocks: ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).to(torch.int8) - 16) * _half(blocks, 0),
    "Q5_1": lambda blocks: (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)) * _half(blocks, 0) + _half(blocks, 2),
    "Q8_0": lambda blocks: blocks[:, 2:].contiguous().view(torch.int8) * _half(blocks, 0),
    "Q6_K": _expand_q6_k,
}


# --- to bytes -------------------------------------------------------------------------------------------------------


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.to(torch.float16).view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, scale, 1 / scale)


def _pack(codes: Tensor) -> Tensor:
    """Codes from 0 to 15, from floats that are rounded down, two in a byte."""
    low, high = codes.nan_to_num(0.0).clamp(0, 15).to(torch.uint8).split(16, -1)
    return low | high << 4


def _quantise_q4_0(x: Tensor) -> Tensor:
    """The number with the largest magnitude (the first, of equals) becomes code 0, which stands for -8."""
    size = x.abs()
    places = torch.where(size == size.amax(-1, keepdim=True), torch.arange(32), 32)
    scale = x.gather(-1, places.amin(-1, keepdim=True)) / -8
    return torch.cat((_bytes(scale), _pack(x * _inverse(scale) + 8.5)), -1)


def _quantise_q4_1(x: Tensor) -> Tensor:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / 15
    return torch.cat((_bytes(scale), _bytes(low), _pack((x - low) * _inverse(scale) + 0.5)), -1)


def _quantise_q8_0(x: Tensor) -> Tensor:
    """Halves are rounded away from zero."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    scaled = (x * _inverse(scale)).nan_to_num(0.0, 0.0, 0.0)  # a scale too small for its inverse is 0 in float16
    size = scaled.abs().floor()
    codes = scaled.sign() * (size + (2 * (scaled.abs() - size)).floor())
    return torch.cat((_bytes(scale), codes.clamp(-127, 127).to(torch.int8).view(torch.uint8)), -1)


_QUANTISE: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "Q8_0": _quantise_q8_0,
    "Q4_0": _quantise_q4_0,
    "Q4_1": _quantise_q4_1,
}
