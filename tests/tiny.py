"""Tiny models for the tests: every part has weights large enough for a fault to show."""

import torch

from qkv.masks import Causal
from qkv.models.stack import Repeat
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.embedders import TokenEmbedderConfig, VectorEmbedderConfig
from qkv.nn.ffn import GLUConfig
from qkv.nn.heads import LMHeadConfig, VectorHeadConfig
from qkv.nn.norms import RMSNormConfig
from qkv.nn.positions import RoPEConfig

VOCAB, FEATURES = 41, 5
NORM, ROPE = RMSNormConfig(), RoPEConfig()


def tiny_config(
    *,
    block=PreNormConfig,
    mask=None,
    position=ROPE,
    table=None,
    vectors=False,
    layers=2,
    tied=True,
    **attention,
):
    """A decoder of width 16 with 4 heads over 2 kv heads."""
    settings = {"n_heads": 4, "n_kv_heads": 2, "mask": mask or Causal(), "position": position} | attention
    parts = (AttentionConfig(**settings), GLUConfig(d_ff=24))
    embed = VectorEmbedderConfig(n_features=FEATURES, position=table) if vectors else None
    return TransformerConfig(
        d_model=16,
        embed=embed or TokenEmbedderConfig(vocab_size=VOCAB, position=table),
        blocks=Repeat(n=layers, pattern=block(norm=NORM, sublayers=parts)),
        final_norm=NORM,
        head=VectorHeadConfig() if vectors else LMHeadConfig(tied=tied),
    )


def tiny_model(dtype=torch.float64, seed=0, config=None, **settings):
    """Its model, in evaluation, with wide weights."""
    torch.manual_seed(seed)
    model = (config or tiny_config(**settings)).build().to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.4).add_(1.0 if "norm" in name else 0.0)
    return model


def token_ids(*shape, seed=1):
    """Random ids."""
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
