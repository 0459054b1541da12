"""Where a number that is not finite came from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def first_non_finite(model: nn.Module, compute: Callable[[], object]) -> str:
    """The first module, in the order of computation, whose output is not finite while `compute` runs the model.

    Returns its name with the kind of module, "the backward pass" if every output is finite.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, torch.Tensor) and not bool(first.isfinite().all()):
                found.append(f"{name} ({type(module).__name__})")

        return hook

    leaves = [(name, part) for name, part in model.named_modules() if not list(part.children())]
    bad = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    if bad:
        return f"the weight {bad[0]}"
    handles = [part.register_forward_hook(watch(name)) for name, part in leaves]
    try:
        with torch.no_grad():
            compute()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the head's loss or the backward pass"
