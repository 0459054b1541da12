"""The seam for looking inside: what attention hands over while it runs, whichever kernel runs."""

from abc import ABC, abstractmethod

from qkv.masks import LoweredMask
from qkv.shapes import Float, Tensor


class Recorder(ABC):
    """Receives what each attention computed. It must not change the tensors; the kernels do not know it is there."""

    @abstractmethod
    def attention(
        self,
        slot: int,
        q: Float[Tensor, "B H T K"],
        k: Float[Tensor, "B G S K"],
        mask: LoweredMask,
        scale: float,
        out: Float[Tensor, "B H T v"],
    ) -> None:
        """Called once per application.

        Args:
            slot: Which application in the stack, counted from the input.
            q: Queries after norm and rotation.
            k: Keys after norm and rotation, with those of the cache.
            mask: Who may attend to whom.
            scale: What q·k is multiplied with before the softmax.
            out: What the kernel really produced, before the output projection.
        """
