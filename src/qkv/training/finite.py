"""Where a number that is not finite came from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def first_non_finite(model: nn.Module, compute: Callable[[], object]) -> str:
    """Where numbers stop being finite while `compute` runs the model: a weight, or the innermost module.

    Random numbers are left as they were.
    """
    for name, p in model.named_parameters():
        if not bool(p.isfinite().all()):
            return f"the weight {name}"
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, torch.Tensor) and not bool(first.isfinite().all()):
                found.append(f"{name} ({type(module).__name__})")

        return hook

    handles = [part.register_forward_hook(watch(name)) for name, part in model.named_modules() if name]
    try:
        # Compiled code would not call the hooks.
        with torch.no_grad(), torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
            compute()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the head's loss or the backward pass"
