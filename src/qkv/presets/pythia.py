"""Pythia (Biderman et al. 2023), of the GPT-NeoX family: parallel sublayers, a quarter of each head rotated."""

from qkv.masks import Causal
from qkv.models.stack import Repeat
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import ParallelPreNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.heads import LMHeadConfig
from qkv.nn.norms import LayerNormConfig
from qkv.nn.positions import RoPEConfig


def pythia(
    *, d_model: int, n_layers: int, n_heads: int, vocab_size: int = 50_304, context: int = 2048
) -> TransformerConfig:
    """A model of the Pythia suite."""
    norm = LayerNormConfig()
    attention = AttentionConfig(n_heads=n_heads, mask=Causal(), bias=True, position=RoPEConfig(fraction=0.25))
    ffn = FFNConfig(d_ff=4 * d_model, activation="gelu", bias=True)
    return TransformerConfig(
        d_model=d_model,
        embed=TokenEmbedderConfig(vocab_size=vocab_size),
        blocks=Repeat(n=n_layers, pattern=ParallelPreNormConfig(norm=norm, sublayers=(attention, ffn))),
        final_norm=norm,
        head=LMHeadConfig(tied=False),
        context=context,
    )
