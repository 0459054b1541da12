"""GPT-2 (Radford et al. 2019): pre-norm, learned positions, tanh-GELU, biases everywhere, tied head."""

from qkv.masks import Causal
from qkv.models.stack import Repeat
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.heads import LMHeadConfig
from qkv.nn.norms import LayerNormConfig
from qkv.nn.positions import LearnedPositionsConfig


def gpt2(
    *, d_model: int, n_layers: int, n_heads: int, vocab_size: int = 50_257, context: int = 1024
) -> TransformerConfig:
    """A model of the GPT-2 family."""
    attention = AttentionConfig(n_heads=n_heads, mask=Causal(), bias=True)
    ffn = FFNConfig(d_ff=4 * d_model, activation="gelu_tanh", bias=True)
    return TransformerConfig(
        d_model=d_model,
        embed=TokenEmbedderConfig(vocab_size=vocab_size, position=LearnedPositionsConfig(length=context)),
        blocks=Repeat(n=n_layers, pattern=PreNormConfig(norm=LayerNormConfig(), sublayers=(attention, ffn))),
        final_norm=LayerNormConfig(),
        head=LMHeadConfig(tied=True),
        context=context,
    )
