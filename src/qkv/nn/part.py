"""What a part of a model answers about itself: cost and quantising ask it, and list no classes."""

from abc import ABC

from torch import nn

from qkv.config import Configured
from qkv.errors import ConfigError
from qkv.shapes import Tensor


class Part(Configured, nn.Module, ABC):
    """Base of sublayers, embedders and heads."""

    def matrix_flops(self) -> int:
        """Floating-point operations where each weight of a matrix acts once for a token: two per weight."""
        return 2 * sum(p.numel() for p in self.parameters() if p.dim() > 1)

    def active_parameters(self) -> int:
        """Parameters that act on one token; fewer than all where tokens are routed to experts."""
        return sum(p.numel() for p in self.parameters())

    def left_wide(self) -> list[Tensor]:
        """Weights of linear maps that quantising leaves as they are, such as those of a router."""
        return []

    def pack(self) -> None:
        """In quantising: replace, in place, what is packed besides linear maps.

        Raises:
            ConfigError: The part itself holds a weight with three axes or more, and does not say how it is packed.
        """
        for name, p in self.named_parameters(recurse=False):
            if p.dim() > 2:
                raise ConfigError(
                    f"{type(self).__name__}.{name} has {p.dim()} axes and cannot be packed; load the model with a dtype"
                )
