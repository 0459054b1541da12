"""qkv, as a user writes it."""

from typing import Any

from torch import Tensor, nn

import qkv.models.transformer
from peers.shapes import Shape
from qkv.presets import gpt2, llama


class Qkv(nn.Module):
    """The model's own loss; compiled block by block."""

    def __init__(self, config: qkv.models.transformer.TransformerConfig) -> None:
        super().__init__()
        self.model = config.build()

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy."""
        loss, _ = self.model.loss(inputs, targets)
        return loss

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Each block for itself: they share what is compiled."""
        for block in self.model.blocks:
            block.compile(*args, **kwargs)


def build(shape: Shape) -> nn.Module:
    if shape.family == "gpt2":
        config = gpt2(
            d_model=shape.d_model,
            n_layers=shape.n_layers,
            n_heads=shape.n_heads,
            vocab_size=shape.vocab_size,
            context=shape.context,
        )
    else:
        config = llama(
            d_model=shape.d_model,
            n_layers=shape.n_layers,
            n_heads=shape.n_heads,
            n_kv_heads=shape.n_kv_heads,
            d_ff=shape.d_ff,
            vocab_size=shape.vocab_size,
            theta=shape.theta,
            context=shape.context,
            tied=True,
        )
    return Qkv(config)
