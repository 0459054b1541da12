"""x-transformers: the closest configuration, with flash attention.

It has no biases on q, k and v and no option for them, and in the Llama shape its gated unit has a bias on the way in.
Its wrapper for training transposes the logits; the plain cross-entropy used here instead is faster.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper

from peers.shapes import Shape


class XTransformers(nn.Module):
    """The logits, and cross-entropy in float32."""

    def __init__(self, model: TransformerWrapper) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy."""
        return F.cross_entropy(self.model(inputs).float().flatten(0, 1), targets.flatten())


def build(shape: Shape) -> nn.Module:
    common: dict[str, Any] = {
        "dim": shape.d_model,
        "depth": shape.n_layers,
        "heads": shape.n_heads,
        "attn_dim_head": shape.d_model // shape.n_heads,
        "attn_flash": True,
        "ff_mult": shape.d_ff / shape.d_model,
    }
    if shape.family == "gpt2":
        layers = Decoder(**common, ff_custom_activation=nn.GELU(approximate="tanh"))
    else:
        layers = Decoder(
            **common,
            attn_kv_heads=shape.n_kv_heads,
            rotary_pos_emb=True,
            rotary_emb_dim=shape.d_model // shape.n_heads,
            use_rmsnorm=True,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
        )
    return XTransformers(
        TransformerWrapper(
            num_tokens=shape.vocab_size, max_seq_len=shape.context, attn_layers=layers, tie_embedding=True
        )
    )
