"""Products with four-bit weights in groups of 32 along a row, by what PyTorch has for CPUs.

For a few vectors PyTorch's own product reads the packed weights. For many it does the same work again for each of them;
there the weights are expanded, some rows at a time, and multiplied as a matrix.
"""

from functools import cache
from typing import Final

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


def pack(
    codes: Integer[Tensor, "N K"], scale: Float[Tensor, "N groups"], zero: Float[Tensor, "N groups"]
) -> tuple[Integer[Tensor, "rows bytes"], Float[Tensor, "groups rows 2"]]:
    """Weights code · scale + zero in PyTorch's layout, with rows up to a multiple of 64.

    Scales and zeros are rounded to bfloat16, which moves a weight by at most 1/64 of the step between two codes.

    Args:
        codes: From 0 to 15.
        scale: One a group.
        zero: What code 0 stands for.
    """
    # PyTorch's codes stand for -8 to 7. Its zero is then the middle of a group: small, it loses little in bfloat16.
    scales = torch.stack([scale, zero + 8 * scale], dim=-1).transpose(0, 1)  # (groups, N, 2)
    pad = -len(codes) % _BLOCK
    codes, scales = F.pad(codes, (0, 0, 0, pad)), F.pad(scales, (0, 0, 0, pad))
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return weight, scales.to(torch.bfloat16).contiguous()


def product(
    x: Float[Tensor, "n K"], weight: Integer[Tensor, "rows bytes"], scales: Float[Tensor, "groups rows 2"]
) -> Float[Tensor, "n rows"]:
    """x Wᵀ: of few vectors from bfloat16 to bfloat16 with sums in float32; of many in what is fastest here.

    Args:
        x: Vectors, of any type.
        weight: From `pack`.
        scales: Likewise.
    """
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
    scale, middle = scales.float()[:, None].unbind(-1)
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
