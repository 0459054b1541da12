"""Llama (Touvron et al. 2023; Grattafiori et al. 2024): pre-RMSNorm, rotary positions, grouped queries, SwiGLU.

Mistral, Phi-3 and Qwen differ from it in windows, and in biases or norms of queries and keys.
"""

from qkv.masks import Causal, Mask
from qkv.models.stack import Repeat
from qkv.models.transformer import TransformerConfig
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
    eps: float = 1e-5,
    mask: Mask | None = None,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> TransformerConfig:
    """A model of the Llama family, or of a near relative.

    Relatives have another mask than the causal one (Mistral), biases of q, k and v (Qwen 2) or norms of q and k (Qwen
    3).
    """
    norm = RMSNormConfig(eps=eps)
    attention = AttentionConfig(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        mask=mask or Causal(),
        bias=qkv_bias,
        out_bias=False,
        position=RoPEConfig(theta=theta),
        qk_norm=norm if qk_norm else None,
    )
    block = PreNormConfig(norm=norm, sublayers=(attention, GLUConfig(d_ff=d_ff, activation="silu")))
    return TransformerConfig(
        d_model=d_model,
        embed=TokenEmbedderConfig(vocab_size=vocab_size),
        blocks=Repeat(n=n_layers, pattern=block),
        final_norm=norm,
        head=LMHeadConfig(tied=tied),
        context=context,
    )
