"""The seam for looking inside: what attention hands over while it runs, whichever kernel runs."""

from collections.abc import Collection
from typing import final

from qkv.ops.backend import Problem
from qkv.ops.reference import weights_of
from qkv.shapes import Float, Tensor


class Recorder:
    """Receives what each attention computed. It must not change the tensors; the kernels do not know it is there."""

    def attention(self, name: str, problem: Problem, out: Float[Tensor, "B H T v"]) -> None:
        """Called once per application.

        Args:
            name: The path of the layer in its stack: `blocks.3.attention`.
            problem: Queries and keys after norm and rotation (keys and values with those of the cache), mask, scale,
                and what else decides the weights.
            out: What the kernel really produced, before the output projection.
        """

    def alignment(self, weights: Float[Tensor, "B T S"]) -> None:
        """Called by recurrent decoders, whose scores are no product of queries and keys.

        Args:
            weights: Of each token of the target over the source; each row sums to 1, and padding has 0.
        """


@final
class AttentionWeights(Recorder):
    """Keeps the weights of attention by the name of the layer: `recorder.weights["blocks.3.attention"][0]`.

    Attributes:
        weights: For each layer what every application of it gave, (B, H, T, S): one for each pass, or for each step of
            a generation. They are computed for this alone, and take memory that grows with the square.
    """

    def __init__(self, only: Collection[str] | None = None) -> None:
        self._only = only
        self.weights: dict[str, list[Tensor]] = {}

    def attention(self, name: str, problem: Problem, out: Float[Tensor, "B H T v"]) -> None:
        if self._only is None or name in self._only:
            self.weights.setdefault(name, []).append(weights_of(problem.without_padding()))
