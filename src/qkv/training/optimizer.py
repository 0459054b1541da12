"""AdamW over a model's parameters, with a state that is saved by the names of the parameters."""

import torch
from torch import nn

from qkv.shapes import Tensor
from qkv.training.recipe import AdamWConfig

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


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
            optimizer.state[p] = {moment: tensors[f"{moment}.{name}"].to(p.device, copy=True) for moment in _MOMENTS}
