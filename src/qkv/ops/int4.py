"""Products with four-bit weights in groups of 32 along a row, by what PyTorch has for CPUs.

For a few vectors PyTorch's own product reads the packed weights. For many it does the same work again for each of them;
there the weights are expanded, some rows at a time, and multiplied as a matrix.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F

from qkv.shapes import Float, Integer, Tensor

GROUP: Final = 32
"""Neighbours in a row that share a scale and a zero."""
_BLOCK = 64
"""Rows that PyTorch packs together where there is AVX-512: a byte holds row i of them and row i + 32."""
_MANY = 64
"""So many vectors cost less with expanded weights, on two cores with AVX-512 (`benchmarks/decode.py`)."""
_EXPANDED = 8 << 20
"""Bytes of expanded weights at once: they are used while the cache of the processor holds them."""
_PACKED = 1 << 18
"""Weights that are packed at once: PyTorch wants their codes as int32, which would be eight times what is kept."""

Groups: TypeAlias = tuple[Integer[Tensor, "N K"], Float[Tensor, "N groups"], Float[Tensor, "N groups"]]
"""Codes, scales and zeros, as `pack` takes them."""


def pack(
    codes: Integer[Tensor, "N K"], scale: Float[Tensor, "N groups"], zero: Float[Tensor, "N groups"]
) -> tuple[Integer[Tensor, "rows bytes"], Float[Tensor, "groups rows 2"]]:
    """Weights code · scale + zero in PyTorch's layout, with rows up to a multiple of 64.

    Scales and zeros are rounded to bfloat16, which moves a weight by at most 1/64 of the step between two codes, of
    which there are 16.
    """
    n, columns = codes.shape
    return pack_parts(((codes[rows], scale[rows], zero[rows]) for rows in parts_of(n, columns)), n, columns)


def pack_parts(
    parts: Iterable[Groups], n: int, columns: int
) -> tuple[Integer[Tensor, "rows bytes"], Float[Tensor, "groups rows 2"]]:
    """`pack` of `n` rows that come some at a time, as `parts_of` cuts them: their codes are never all in memory."""
    rows = n + -n % _BLOCK
    weight = torch.empty(rows, columns // 2, dtype=torch.uint8)
    scales = torch.zeros(columns // GROUP, rows, 2, dtype=torch.bfloat16)
    at = 0
    for codes, scale, zero in parts:
        end = at + len(codes)
        # PyTorch's codes stand for -8 to 7. Its zero is then the middle of a group: small, it loses little in bfloat16.
        scales[:, at:end, 0], scales[:, at:end, 1] = scale.T, (zero + 8 * scale).T
        whole = codes if len(codes) % _BLOCK == 0 else F.pad(codes, (0, 0, 0, -len(codes) % _BLOCK))
        weight[at : at + len(whole)] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.int(), 1)
        at = end
    assert at == n, "the parts are not all the rows"
    return weight, scales


def parts_of(n: int, columns: int) -> Iterator[slice]:
    """`n` rows, cut where PyTorch's layout can be cut."""
    step = _BLOCK * max(1, _PACKED // (_BLOCK * columns))
    return (slice(a, min(a + step, n)) for a in range(0, n, step))


def product(
    x: Float[Tensor, "n K"], weight: Integer[Tensor, "rows bytes"], scales: Float[Tensor, "groups rows 2"]
) -> Float[Tensor, "n rows"]:
    """x Wᵀ with weights from `pack`: few vectors in bfloat16 with sums in float32, many in what is fastest here."""
    if len(x) < _MANY or not _layout_is_known():
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), weight, GROUP, scales)
    rows, step = len(weight), max(1, _EXPANDED // (4 * _BLOCK * x.shape[1])) * _BLOCK
    x = x.to(torch.bfloat16 if _bfloat16_is_fast() else torch.float32)
    out = x.new_empty(len(x), rows)
    for a in range(0, rows, step):
        part = slice(a, a + step)
        torch.mm(x, _columns(weight[part], scales[:, part], x.dtype), out=out[:, part])
    return out


def _columns(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Float[Tensor, "K rows"]:
    """Wᵀ, expanded."""
    n_columns, n_blocks = 2 * weight.shape[1], len(weight) // _BLOCK
    codes = weight.reshape(n_blocks, n_columns, _BLOCK // 2).transpose(0, 1)
    wide = torch.empty(n_columns, n_blocks, 2, _BLOCK // 2, dtype=dtype)
    wide[:, :, 0] = codes & 15
    wide[:, :, 1] = codes >> 4
    scale, middle = scales.float().movedim(-1, 0).contiguous()[:, :, None]  # neighbours, or nothing is vectorised
    zero = middle - 8 * scale
    groups = wide.view(len(scales), GROUP, -1)
    return torch.addcmul(zero.to(dtype), groups, scale.to(dtype), out=groups).flatten(0, 1)


@cache
def _layout_is_known() -> bool:
    """Whether PyTorch packs on this machine as `_columns` expects; without AVX-512 it does not."""
    codes = torch.arange(_BLOCK * GROUP).view(_BLOCK, GROUP) * 7 % 16
    weight, scales = pack(codes, torch.ones(_BLOCK, 1), torch.zeros(_BLOCK, 1))
    return torch.equal(_columns(weight, scales, torch.float32).T, codes.float())


@cache
def _bfloat16_is_fast() -> bool:
    return torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
