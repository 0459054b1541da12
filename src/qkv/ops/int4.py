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
_MANY = 128
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

    Scales and zeros are rounded to bfloat16, which moves a weight by at most 1/64 of the step between two codes.

    Args:
        codes: From 0 to 15.
        scale: One a group.
        zero: What code 0 stands for.
    """
    n, columns = codes.shape
    parts = ((codes[rows], scale[rows], zero[rows]) for rows in parts_of(n, columns))
    return pack_parts(parts, n, columns)


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
    """x Wᵀ, in bfloat16 as `x` is; the sums are in float32.

    Args:
        x: Vectors.
        weight: From `pack`.
        scales: Likewise.
    """
    if len(x) < _MANY or not _layout_is_known():
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, GROUP, scales)
    n, rows = len(x), len(weight)
    wide = x if _bfloat16_is_fast() else x.float()
    sums = x.view(n, -1, GROUP).float().sum(-1)  # what the middles of the groups are multiplied with
    out = torch.empty(n, rows // _BLOCK, 2, _BLOCK // 2, dtype=x.dtype)
    step = max(1, _EXPANDED // (4 * _BLOCK * x.shape[1]))
    for a in range(0, rows // _BLOCK, step):
        scale, middle = _pairs(scales, a, a + step)
        columns = _codes(weight, a, a + step).mul_(scale[:, None]).flatten(0, 1)
        y = (wide @ columns.to(wide.dtype)).float().addmm_(sums, middle)
        part = out[:, a : a + step]
        part.copy_(y.view(n, -1, _BLOCK // 2, 2).transpose(2, 3))
    return out.view(n, rows)


def _codes(weight: Tensor, a: int, b: int) -> Float[Tensor, "groups 32 columns"]:
    """The codes, less 8, of the rows of blocks `a` to `b`, as columns: row i of a block stands beside row i + 32."""
    blocks = weight.view(-1, 2 * weight.shape[1], _BLOCK // 2)[a:b]  # (blocks, K, 32)
    n_bytes = len(blocks) * _BLOCK // 2
    # PyTorch's tables of four-bit vectors have a float16 scale and zero behind each: here 1 and -8, for the bare codes.
    table = torch.empty(blocks.shape[1], n_bytes + 4, dtype=torch.uint8)
    table[:, :n_bytes].view(-1, len(blocks), _BLOCK // 2).copy_(blocks.transpose(0, 1))
    table[:, n_bytes:] = torch.tensor([1.0, -8.0], dtype=torch.float16).view(torch.uint8)
    return torch.ops.quantized.embedding_bag_4bit_unpack(table).view(-1, GROUP, n_bytes * 2)


def _pairs(scales: Tensor, a: int, b: int) -> tuple[Float[Tensor, "groups columns"], Float[Tensor, "groups columns"]]:
    """Scales and middles in the order of `_codes`."""
    pairs = scales.view(len(scales), -1, 2, _BLOCK // 2, 2)[:, a:b].permute(4, 0, 1, 3, 2).float()
    scale, middle = pairs.reshape(2, len(scales), -1)
    return scale, middle


@cache
def _layout_is_known() -> bool:
    """Whether PyTorch packs on this machine as `_codes` unpacks; without AVX-512 it does not."""
    codes = torch.arange(_BLOCK * GROUP).view(_BLOCK, GROUP) * 7 % 16
    weight, _ = pack(codes, torch.ones(_BLOCK, 1), torch.zeros(_BLOCK, 1))
    columns = _codes(weight, 0, 1).view(GROUP, _BLOCK // 2, 2).transpose(1, 2).flatten(1)
    return torch.equal(columns.T + 8, codes.float())


@cache
def _bfloat16_is_fast() -> bool:
    return torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]
