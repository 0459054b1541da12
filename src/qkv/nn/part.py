"""What a part of a model answers about itself: cost and quantising ask it, and list no classes."""

from abc import ABC
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

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


@contextmanager
def watching(model: nn.Module, see: Callable[[str, nn.Module, Tensor], None]) -> Generator[None, None, None]:
    """Shows `see` the path of each module inside, the module and its output (the first of several), as they end."""

    def hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def shown(module: nn.Module, _: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                see(path, module, first)

        return shown

    handles = [part.register_forward_hook(hook(path)) for path, part in model.named_modules() if path]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
