"""Initialisation as data: each weight is a function of a seed and of its name."""

import hashlib
import math
from typing import final

import torch
from torch import nn

from qkv.config import Config, config
from qkv.nn.additive import AdditiveScore
from qkv.nn.embedders import Embedder
from qkv.nn.sublayer import Sublayer
from qkv.shapes import Tensor


@final
@config
class InitConfig(Config):
    """Weights from N(0, std²); biases 0, norms 1; the vectors of recurrent networks and convolutions as in PyTorch.

    Attributes:
        std: Standard deviation of the weights. None: 1/√fan_in of each.
        embed_std: That of the embedding and position tables. None: `std`, or 0.02 where that is None too.
        scale_residual: Divide that of the weights that write to the stream by the root of how many do, so that the
            stream's variance does not grow with depth (Radford et al. 2019, section 2.3).
    """

    std: float | None = 0.02
    embed_std: float | None = None
    scale_residual: bool = True

    @torch.no_grad()
    def apply(self, model: nn.Module, sublayers: list[Sublayer], n_updates: int, seed: int, prefix: str = "") -> None:
        """Draw the weights of `model` in place, each from a generator of its own.

        Args:
            model: What to initialise.
            sublayers: Its sublayers.
            n_updates: How many updates are added to the stream in one pass.
            seed: The weights are those of another model with this seed, wherever name, shape and deviation agree.
            prefix: What comes before the names of the parameters, where `model` is a part of another.
        """
        residual = {id(weight) for part in sublayers for weight in part.residual_weights()}
        tables = {id(p) for part in model.modules() if isinstance(part, Embedder) for p in part.parameters()}
        for name, p in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            if p.dim() > 1:
                std = self._std(owner, p, table=id(p) in tables and not isinstance(owner, nn.Linear))
                if id(p) in residual and self.scale_residual:
                    std /= math.sqrt(n_updates)
                p.copy_(_empty(p).normal_(0, std, generator=_generator(seed, prefix + name)))
            elif isinstance(owner, nn.Linear):
                p.zero_()
            elif (bound := _bound(owner)) is not None:
                p.copy_(_empty(p).uniform_(-bound, bound, generator=_generator(seed, prefix + name)))

    def _std(self, owner: nn.Module, weight: Tensor, *, table: bool) -> float:
        if table and (self.embed_std is not None or self.std is None):
            return 0.02 if self.embed_std is None else self.embed_std
        return 1 / math.sqrt(_fan_in(owner, weight)) if self.std is None else self.std


def draw_seed() -> int | None:
    """A seed for the weights of a model: one number from PyTorch's global generator; None on the meta device.

    Drawn before the parts are made, it does not depend on them: they draw numbers that nobody uses.
    """
    return None if torch.get_default_device().type == "meta" else int(torch.randint(1 << 62, (), device="cpu"))


def _generator(seed: int, name: str) -> torch.Generator:
    made = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(made[:8], "big"))


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.promote_types(like.dtype, torch.float32), device="cpu")


def _fan_in(owner: nn.Module, weight: Tensor) -> int:
    """Inputs of one output. Before the last two axes stand the matrices of a stack, such as experts."""
    return weight[0].numel() if isinstance(owner, nn.Conv1d) else weight.shape[-1]


def _bound(owner: nn.Module) -> float | None:
    """The range of a part's vectors where they are drawn; None: they begin as constants."""
    if isinstance(owner, nn.RNNBase):
        return owner.hidden_size**-0.5
    if isinstance(owner, nn.Conv1d):
        return _fan_in(owner, owner.weight) ** -0.5
    return owner.v.numel() ** -0.5 if isinstance(owner, AdditiveScore) else None
