"""The model of the default recipe: small enough to learn a book on two CPU cores in a few minutes."""

from qkv.masks import Causal
from qkv.models.init import InitConfig
from qkv.models.stack import Repeat
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import GLUConfig
from qkv.nn.heads import LMHeadConfig
from qkv.nn.norms import RMSNormConfig
from qkv.nn.positions import RoPEConfig


def small(
    *, d_model: int = 128, n_layers: int = 4, n_heads: int = 2, vocab_size: int | None = None
) -> TransformerConfig:
    """Four blocks of width 128; the vocabulary is the tokenizer's, where it is not given."""
    norm = RMSNormConfig()
    attention = AttentionConfig(n_heads=n_heads, mask=Causal(), position=RoPEConfig(), qk_norm=norm)
    return TransformerConfig(
        d_model=d_model,
        embed=TokenEmbedderConfig(vocab_size=vocab_size),
        blocks=Repeat(n=n_layers, pattern=PreNormConfig(norm=norm, sublayers=(attention, GLUConfig(multiple_of=32)))),
        final_norm=norm,
        head=LMHeadConfig(tied=True),
        init=InitConfig(),
    )
