"""Gemma 2 (Gemma Team 2024): norms around sublayers, windows in every other layer, bounded scores and logits."""

from qkv.masks import Causal, Mask, Window
from qkv.models.stack import Repeat
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import SandwichConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import GLUConfig
from qkv.nn.heads import LMHeadConfig
from qkv.nn.norms import RMSNormConfig
from qkv.nn.positions import RoPEConfig


def gemma2(
    *,
    d_model: int,
    n_rounds: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    d_ff: int,
    vocab_size: int = 256_000,
    window: int = 4096,
    context: int = 8192,
) -> TransformerConfig:
    """A model of the Gemma 2 family; a round is a layer with a window and one without."""
    norm = RMSNormConfig(eps=1e-6, offset=1.0)

    def block(mask: Mask) -> SandwichConfig:
        attention = AttentionConfig(
            n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, mask=mask, position=RoPEConfig(), softcap=50.0
        )
        return SandwichConfig(norm=norm, sublayers=(attention, GLUConfig(d_ff=d_ff, activation="gelu_tanh")))

    return TransformerConfig(
        d_model=d_model,
        embed=TokenEmbedderConfig(vocab_size=vocab_size, scale=None),
        blocks=Repeat(n=n_rounds, pattern=(block(Causal() & Window(size=window)), block(Causal()))),
        final_norm=norm,
        head=LMHeadConfig(tied=True, softcap=30.0),
        context=context,
    )
