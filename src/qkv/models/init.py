"""Initialisation as data."""

import math
from typing import final

from torch import nn

from qkv.config import Config, config
from qkv.nn.embedders import Embedder
from qkv.nn.sublayer import Sublayer


@final
@config
class InitConfig(Config):
    """Weights from N(0, std²); biases 0, norms 1.

    Attributes:
        std: Standard deviation of the weights. None: 1/√fan_in of each.
        embed_std: That of the embedding and position tables. None: `std`, or 0.02 where that is None too.
        scale_residual: Divide that of the weights that write to the stream by the root of how many do, so that the
            stream's variance does not grow with depth (Radford et al. 2019, section 2.3).
    """

    std: float | None = 0.02
    embed_std: float | None = None
    scale_residual: bool = True

    def apply(self, model: nn.Module, sublayers: list[Sublayer], n_updates: int) -> None:
        """Draw the weights of `model` in place, from PyTorch's global generator, in the order of their names.

        Args:
            model: What to initialise.
            sublayers: Its sublayers.
            n_updates: How many updates are added to the stream in one pass.
        """
        embed_std = self.embed_std if self.embed_std is not None else (0.02 if self.std is None else self.std)
        residual = {id(weight) for part in sublayers for weight in part.residual_weights()}
        tables = {
            id(p) for part in model.modules() if isinstance(part, Embedder) for p in part.parameters() if p.dim() == 2
        }
        for weight in (p for p in model.parameters() if p.dim() > 1):
            std = 1 / math.sqrt(weight[0].numel()) if self.std is None else self.std
            if id(weight) in tables:
                std = embed_std
            elif id(weight) in residual and self.scale_residual:
                std /= math.sqrt(n_updates)
            nn.init.normal_(weight, std=std)
        for part in model.modules():
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
