"""The seam for looking inside: what attention hands over while it runs, whichever kernel runs."""

from abc import ABC, abstractmethod

from qkv.ops.backend import Problem
from qkv.shapes import Float, Tensor


class Recorder(ABC):
    """Receives what each attention computed. It must not change the tensors; the kernels do not know it is there."""

    @abstractmethod
    def attention(self, slot: int, problem: Problem, out: Float[Tensor, "B H T v"]) -> None:
        """Called once per application.

        Args:
            slot: Which application in the stack, counted from the input.
            problem: Queries and keys after norm and rotation (keys and values with those of the cache), mask, scale,
                and what else decides the weights.
            out: What the kernel really produced, before the output projection.
        """

    def alignment(self, slot: int, weights: Float[Tensor, "B T S"]) -> None:  # noqa: B027 - nothing is a fine answer
        """Called by recurrent decoders, whose scores are no product of queries and keys.

        Args:
            slot: Which application, counted from the input.
            weights: Of each token of the target over the source; each row sums to 1, and padding has 0.
        """
