"""A causal convolution as a sublayer: each token reads the last few."""

from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import Count, config
from qkv.documents import Documents
from qkv.nn.mixer import Kept, Stateful
from qkv.nn.sublayer import SublayerConfig
from qkv.shapes import Float, Tensor


@final
@config
class ConvolutionConfig(SublayerConfig):
    """project(a · σ(b)), where a and b are convolutions over a token and those before it in its document.

    Source: Dauphin et al. 2017, section 2 (gated convolutional networks).

    Attributes:
        width: Tokens that it reads, itself included, so 1 is itself alone.
    """

    name: ClassVar[str] = "convolution"

    width: Count = 4

    def notes(self, d_model: int) -> list[str]:
        return [f"reads {self.width} tokens", "gated"]


@final
class Convolution(Stateful, config=ConvolutionConfig):
    """A gated convolution and a projection of its output to the stream."""

    def __init__(self, config: ConvolutionConfig, d_model: int) -> None:
        super().__init__(config)
        self.width = config.width
        self.conv = nn.Conv1d(d_model, 2 * d_model, config.width)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def run(self, x: Float[Tensor, "N L D"], documents: Documents, state: Kept) -> tuple[Float[Tensor, "N L D"], Kept]:
        """See `Stateful`; carried on are the last inputs that a later token reads."""
        (before,) = state
        seen = torch.cat([before.to(x.dtype), x], dim=1)
        mixed = F.glu(self.conv(seen.transpose(1, 2)).transpose(1, 2), dim=-1)
        last = documents.lengths[:, None] + torch.arange(self.width - 1, device=x.device)
        kept = seen.gather(1, last[..., None].expand(-1, -1, x.shape[-1]))
        return self.o_proj(mixed), (kept,)

    def fresh(self, n: int, like: Tensor) -> Kept:
        return (like.new_zeros(n, self.width - 1, like.shape[-1]),)
