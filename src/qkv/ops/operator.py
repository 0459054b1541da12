# pyright: reportUnknownMemberType=false, reportUnknownLambdaType=false, reportUnknownArgumentType=false
"""Operators with a backward pass of their own: a compiler sees one node, whatever happens inside."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from qkv.shapes import Tensor

Tensors: TypeAlias = list[Tensor]
Operator: TypeAlias = Callable[[Tensors, list[float]], Tensors]


def operator(
    name: str,
    forward: Operator,
    backward: Callable[[Tensors, list[float], Tensors, Tensors], Tensors],
    *,
    outputs: Callable[[Tensors], Tensors],
    gradients: Callable[[Tensors], Tensors],
) -> Operator:
    """`forward` as the operator `qkv::name`, from tensors and numbers to fresh tensors; it has no second derivative.

    Args:
        name: Its name, and before `_backward` that of its backward pass.
        forward: What it computes.
        backward: From its arguments, its results and their gradients to the gradients of the first of its tensors.
        outputs: Memory for the results of `forward`, in the same layout.
        gradients: The same for those of `backward`.
    """
    arguments = "Tensor[] tensors, float[] numbers"
    run = torch.library.custom_op(f"qkv::{name}", forward, mutates_args=(), schema=f"({arguments}) -> Tensor[]")
    run_backward = torch.library.custom_op(
        f"qkv::{name}_backward",
        backward,
        mutates_args=(),
        schema=f"({arguments}, Tensor[] results, Tensor[] grads) -> Tensor[]",
    )
    run.register_fake(lambda tensors, numbers: outputs(tensors))
    run_backward.register_fake(lambda tensors, numbers, results, grads: gradients(tensors))

    def setup(ctx: Any, inputs: tuple[Tensors, list[float]], output: Tensors) -> None:
        tensors, ctx.numbers = inputs
        ctx.n = len(tensors)
        ctx.save_for_backward(*tensors, *output)

    def differentiate(ctx: Any, grads: Tensors) -> tuple[list[Tensor | None], Any]:
        saved = list(ctx.saved_tensors)
        tensors, results = saved[: ctx.n], saved[ctx.n :]
        found = run_backward(tensors, ctx.numbers, results, grads)
        # An empty list has no place for a None, and a list of numbers is one place.
        return [*found, *[None] * (ctx.n - len(found))], None if ctx.numbers else []

    run.register_autograd(differentiate, setup_context=setup)
    return run
