"""AdamW over a model's parameters, with a state that is saved by the names of the parameters."""

from typing import Annotated, final

import torch
from torch import nn

from qkv.config import Config, Positive, config, must
from qkv.errors import ConfigError
from qkv.shapes import Tensor

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@final
@config
class AdamWConfig(Config):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), fused.

    Attributes:
        lr: The highest learning rate; the schedule multiplies it.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the root of the second.
        weight_decay: Per step and unit of learning rate, on weights with two axes (not on norms and biases).
    """

    lr: Annotated[float, must("be above 0 and finite", lambda x: x > 0)] = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, must("not be negative", lambda x: x >= 0)] = 0.1

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={list(self.betas)} must be at least 0 and below 1")


def make_optimizer(config: AdamWConfig, model: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over what is not frozen; weight decay on what has two axes or more, not on norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def optimizer_tensors(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, Tensor]:
    """The state to save: `<moment>.<parameter>`."""
    return {
        f"{moment}.{name}": optimizer.state[p][moment]
        for name, p in model.named_parameters()
        for moment in _MOMENTS
        if p in optimizer.state
    }


def load_optimizer(optimizer: torch.optim.AdamW, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put saved state back. The tensors are copied: what is memory-mapped belongs to a file that will be pruned."""
    for name, p in model.named_parameters():
        if f"step.{name}" in tensors:
            for moment in _MOMENTS:  # the fused optimiser looks at none of it, and would write past the end
                saved = tensors[f"{moment}.{name}"]
                shape, dtype = (torch.Size(), torch.float32) if moment == "step" else (p.shape, p.dtype)
                if saved.shape != shape or saved.dtype != dtype:
                    raise RuntimeError(f"{moment}.{name} is {saved.dtype} of shape {tuple(saved.shape)}")
            optimizer.state[p] = {moment: tensors[f"{moment}.{name}"].to(p.device, copy=True) for moment in _MOMENTS}
