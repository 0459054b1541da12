"""Where a number that is not finite came from."""

from collections.abc import Callable

import torch
from torch import nn

from qkv.nn.part import watching
from qkv.shapes import Tensor


def first_non_finite(model: nn.Module, compute: Callable[[], object]) -> str:
    """Where numbers stop being finite while `compute` runs the model: a weight, or the innermost module.

    Random numbers are left as they were.
    """
    for name, p in model.named_parameters():
        if not bool(p.isfinite().all()):
            return f"the weight {name}"
    found: list[str] = []

    def see(name: str, module: nn.Module, output: Tensor) -> None:
        if not found and not bool(output.isfinite().all()):
            found.append(f"{name} ({type(module).__name__})")

    # Compiled code would not call the hooks.
    with watching(model, see), torch.no_grad(), torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
        compute()
    return found[0] if found else "the head's loss or the backward pass"
