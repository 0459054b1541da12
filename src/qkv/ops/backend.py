"""What every backend of attention is: a name, what it cannot do, and how it runs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from qkv.lowered import LoweredMask
from qkv.shapes import Float, Int, Tensor


@dataclass(frozen=True)
class Problem:
    """One call of attention, as a backend gets it: the arguments of `attend`, with the mask lowered."""

    q: Float[Tensor, "B H T K"]
    k: Float[Tensor, "B G S K"]
    v: Float[Tensor, "B G S v"]
    mask: LoweredMask
    scale: float
    dropout: float = 0.0
    bias: Float[Tensor, "H distances"] | None = None
    sinks: Float[Tensor, " H"] | None = None
    softcap: float | None = None

    def without_padding(self) -> "Problem":
        """The same with zeros where there is padding: a kernel that reads masked values lets a NaN through."""
        queries, keys = self.mask.query_valid, self.mask.key_valid
        if queries is None and keys is None:
            return self
        k, v = (self.k, self.v) if keys is None else (_zeroed(self.k, keys), _zeroed(self.v, keys))
        return replace(self, q=self.q if queries is None else _zeroed(self.q, queries), k=k, v=v)

    def bias_tensor(self) -> Float[Tensor, "#B H T S"]:
        """The bias of every pair; quadratic."""
        assert self.bias is not None
        q, k = self.mask.places
        # Wide, so that its gradient is: a sum over all pairs of one distance.
        bias = self.bias.to(torch.promote_types(self.bias.dtype, torch.float32))
        return bias[:, place_of_distance(q[0], k[0], bias.shape[1])].transpose(0, 1)


def place_of_distance(q_index: Int[Tensor, "#B T"], k_index: Int[Tensor, "#B S"], size: int) -> Int[Tensor, "#B T S"]:
    """The column of a bias (H, size) for each pair: that of `k - q`, 0 in the middle, the ends for all beyond them."""
    reach = size // 2
    return (k_index[..., None, :] - q_index[..., :, None]).clamp(-reach, reach) + reach


def _zeroed(x: Tensor, valid: Tensor) -> Tensor:
    """`x` (B, heads, T, width) with zeros where `valid` (B, T) is False, even if there was a NaN."""
    return torch.where(valid[:, None, :, None], x, 0.0)


class Backend(NamedTuple):
    """A way to compute attention.

    Attributes:
        name: What it is asked for by.
        refuses: Why it cannot compute a problem, as the end of a sentence that begins with its name; empty if it can.
        run: The output, (B, H, T, v).
        memory: Bytes that the forward pass takes beyond its input and output, without what a library takes inside.
    """

    name: str
    refuses: Callable[[Problem], str]
    run: Callable[[Problem], Tensor]
    memory: Callable[[Problem], int]
