"""What a model reads of an item, a text or a picture, and several of them side by side."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from qkv.shapes import Tensor
from qkv.tokens import Tokens


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
    inputs, tokens = side_by_side(reads)
    sizes = {(len(each.values), each.grid) for each in reads}
    if len(sizes) > 1:
        return inputs, tokens
    ((length, grid),) = sizes
    n = len(reads)
    rows = Tokens.full(n, length) if grid is None else Tokens.pictures([[grid]] * n, prefix=reads[0].prefix)
    if grid is None and tokens.types is not None:
        rows = rows.with_types(tokens.types.view(n, length))
    return inputs.view(n, length, *inputs.shape[2:]), rows


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
