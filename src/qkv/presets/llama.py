"""Llama (Touvron et al. 2023; Grattafiori et al. 2024): pre-RMSNorm, rotary positions, grouped queries, SwiGLU."""

from qkv.masks import Causal
from qkv.models.transformer import Repeat, TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import GLUConfig
from qkv.nn.heads import LMHeadConfig
from qkv.nn.norms import RMSNormConfig
from qkv.nn.positions import RoPEConfig


def llama(
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    d_ff: int,
    vocab_size: int,
    theta: float,
    context: int,
    tied: bool = False,
) -> TransformerConfig:
    """A model of the Llama family."""
    norm = RMSNormConfig(eps=1e-5)
    attention = AttentionConfig(n_heads=n_heads, n_kv_heads=n_kv_heads, mask=Causal(), position=RoPEConfig(theta=theta))
    block = PreNormConfig(norm=norm, sublayers=(attention, GLUConfig(d_ff=d_ff, activation="silu")))
    return TransformerConfig(
        d_model=d_model,
        embed=TokenEmbedderConfig(vocab_size=vocab_size),
        blocks=Repeat(n=n_layers, pattern=block),
        final_norm=norm,
        head=LMHeadConfig(tied=tied),
        context=context,
    )
