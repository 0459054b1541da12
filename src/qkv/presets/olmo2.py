"""OLMo 2 (OLMo Team 2024): norms behind the sublayers, and of queries and keys over all heads at once."""

from qkv.masks import Causal
from qkv.models.stack import Repeat
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import OutputNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import GLUConfig
from qkv.nn.heads import LMHeadConfig
from qkv.nn.norms import RMSNormConfig
from qkv.nn.positions import RoPEConfig


def olmo2(
    *, d_model: int, n_layers: int, n_heads: int, d_ff: int, vocab_size: int = 100_352, context: int = 4096
) -> TransformerConfig:
    """A model of the OLMo 2 family."""
    norm = RMSNormConfig(eps=1e-6)
    attention = AttentionConfig(
        n_heads=n_heads, mask=Causal(), position=RoPEConfig(theta=5e5), qk_norm=norm, qk_norm_over="heads"
    )
    block = OutputNormConfig(norm=norm, sublayers=(attention, GLUConfig(d_ff=d_ff, activation="silu")))
    return TransformerConfig(
        d_model=d_model,
        embed=TokenEmbedderConfig(vocab_size=vocab_size),
        blocks=Repeat(n=n_layers, pattern=block),
        final_norm=norm,
        head=LMHeadConfig(tied=False),
        context=context,
    )
