"""What a model reads of an item, a text or a picture, and several of them side by side."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from qkv.shapes import Tensor
from qkv.tokens import Layout, Tokens


class Read(NamedTuple):
    """A text or a picture as a model reads it.

    Attributes:
        values: The ids of its tokens, with the special ones around it; or patches, (T, values), with a row of zeros for
            each token of the prefix before them.
        types: The kind of each; None: all are of kind 0.
        grid: Rows and columns of patches; None: a text.
        prefix: Tokens before the patches that the model has trained; of each picture the same number.
    """

    values: Any
    types: Sequence[int] | None = None
    grid: tuple[int, int] | None = None
    prefix: int = 0


def without_padding(reads: Sequence[Read]) -> tuple[Tensor, Tokens]:
    """Items as a batch: those of equal length in a row each, which has faster kernels; else side by side in one."""
    if len({(len(each.values), each.grid) for each in reads}) > 1:
        return side_by_side(reads)
    inputs, row = torch.stack([torch.as_tensor(each.values) for each in reads]), side_by_side(reads[:1])[1]
    rows = replace(row, layout=Layout.FULL).take(torch.zeros(len(reads), dtype=torch.long))
    if any(each.types is not None for each in reads):
        rows = rows.with_types(torch.tensor([each.types or [0] * len(each.values) for each in reads]))
    return inputs, rows


def side_by_side(reads: Sequence[Read], device: torch.device | None = None) -> tuple[Tensor, Tokens]:
    """Items in one row, so that nothing is padded, and where their tokens stand: all of them texts, or pictures."""
    grids = [each.grid for each in reads if each.grid is not None]
    if grids:
        tokens = Tokens.pictures([grids], prefix=reads[0].prefix, device=device)
    else:
        tokens = Tokens.packed([[len(each.values) for each in reads]], device=device)
    if any(each.types is not None for each in reads):
        types = [kind for each in reads for kind in each.types or [0] * len(each.values)]
        tokens = tokens.with_types(torch.tensor([types], device=device))
    return torch.cat([torch.as_tensor(each.values, device=device) for each in reads])[None], tokens
