"""Adapters: a few trainable weights beside frozen ones (LoRA)."""

import math
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import Config, Count, Positive, Share, config
from qkv.errors import ConfigError, suggest
from qkv.nn.sublayer import Sublayer
from qkv.shapes import Float, Int, Tensor

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]


@final
@config
class LoRAConfig(Config):
    """Low-rank adapters: W x + alpha / rank · B A x, with W frozen (Hu et al. 2021, section 4.1).

    They sit on slices of projections, each with an A and a B of its own, also where projections are fused.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: Strength; alpha / rank is what B A is multiplied with.
        dropout: Probability that an element of A's input is dropped in training; slices of one projection share it.
        targets: The slices; None: all that the model has.
    """

    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Share = 0.0
    targets: tuple[Target, ...] | None = None

    def __post_init__(self) -> None:
        if self.targets is not None and len(set(self.targets)) != max(1, len(self.targets)):
            raise ConfigError(f"targets={list(self.targets)} must name one slice or more, each once; null takes all")


@final
class LoRALinear(nn.Module):
    """A projection with adapters on slices of its rows: base(x) + alpha / rank · B A x. See `LoRAConfig`.

    The A of all slices make one product, and so do their B, spread over the rows of the base.

    Differs from the paper: A begins uniform, with the variance 1 / (3 in) that the authors' code gives it.

    Args:
        base: The projection; it is held as it is, and may be anything that maps (…, in) to (…, out).
        slices: For each slice the rows of the base's output that it has.
        config: Rank, strength and dropout.
    """

    def __init__(self, base: nn.Linear, slices: dict[str, Int[Tensor, " rows"]], config: LoRAConfig) -> None:
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        self.names = tuple(slices)  # the order of the rows; a ParameterDict sorts its names
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_a = nn.ParameterDict({name: torch.empty(config.rank, base.in_features, **like) for name in slices})
        self.lora_b = nn.ParameterDict({name: torch.zeros(len(r), config.rank, **like) for name, r in slices.items()})
        rows = torch.cat(list(slices.values()))
        order = torch.full((base.out_features,), len(rows))  # of what has no adapter: a row of zeros, after the others
        order[rows] = torch.arange(len(rows))
        self.order: Tensor
        self.register_buffer("order", order.to(base.weight.device), persistent=False)
        for a in self.lora_a.values():
            nn.init.uniform_(a, -1 / math.sqrt(base.in_features), 1 / math.sqrt(base.in_features))
        self.train(base.training)

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        """The projection and its low-rank update."""
        read = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.base(x) + F.linear(F.linear(read, self._a()) * self.scale, self._b())

    def update(self) -> Float[Tensor, "out in"]:
        """What the adapters add to the weight."""
        return self.scale * (self._b() @ self._a())

    def merged(self) -> nn.Linear:
        """The projection with the update in its weight."""
        wide = torch.promote_types(self.base.weight.dtype, torch.float32)
        with torch.no_grad():
            weight = (self.base.weight.to(wide) + self.update().to(wide)).to(self.base.weight.dtype)
        self.base.weight = nn.Parameter(weight)
        return self.base

    def _a(self) -> Tensor:
        return torch.cat([self.lora_a[name] for name in self.names])  # (slices · rank, in)

    def _b(self) -> Tensor:
        stacked = torch.block_diag(*(self.lora_b[name] for name in self.names))  # (rows of the slices, slices · rank)
        return F.pad(stacked, (0, 0, 0, 1)).index_select(0, self.order)  # (out, slices · rank)


def add_adapters(model: nn.Module, config: LoRAConfig) -> None:
    """Freeze a model's weights and put adapters beside them, drawn from PyTorch's global generator.

    They begin as no update at all: what the model computes stays the same to the last bit.

    Raises:
        ConfigError: The model has adapters already, or nothing of the name of a target.
    """
    if any(isinstance(part, LoRALinear) for part in model.modules()):
        raise ConfigError("the model has adapters already; merge them first")
    parts = [part for part in model.modules() if isinstance(part, Sublayer)]
    known = {name for part in parts for slices in part.slices().values() for name in slices}
    targets = known if config.targets is None else set(config.targets)
    for target in sorted(targets - known):
        raise ConfigError(f"adapter.targets: the model has no slice {target!r}; {suggest(target, known)}")
    model.requires_grad_(False)
    for part in parts:
        for name, slices in part.slices().items():
            if chosen := {key: rows for key, rows in slices.items() if key in targets}:
                base = dict(part.named_children()).get(name)
                if not isinstance(base, nn.Linear):
                    raise ConfigError(
                        f"{type(part).__name__}.{name} is no linear map, so no adapter fits on {', '.join(chosen)}; "
                        "name other slices in adapter.targets"
                    )
                setattr(part, name, LoRALinear(base, chosen, config))


def merge_adapters(model: nn.Module) -> None:
    """Fold the adapters into the weights, and put the plain projections back; every weight is trainable again.

    The outputs stay the same up to the rounding of the weights' type.
    """
    for owner in list(model.modules()):
        for name, part in list(owner.named_children()):
            if isinstance(part, LoRALinear):
                setattr(owner, name, part.merged())
    model.requires_grad_()


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights by name: `<path of the projection>.lora_a.<slice>` and `.lora_b.<slice>`."""
    return {
        f"{path}.{name}": p.detach()
        for path, part in model.named_modules()
        if isinstance(part, LoRALinear)
        for name, p in part.named_parameters()
        if name.startswith(("lora_a.", "lora_b."))
    }


def load_adapters(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy weights, named as in `adapter_state`, into a model's adapters."""
    with torch.no_grad():
        for name, p in adapter_state(model).items():
            p.copy_(state[name])
