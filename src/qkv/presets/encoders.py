"""Families of encoders as plain data: what differs between them, and their sizes as parameters."""

from collections.abc import Callable
from functools import partial
from typing import Final

from qkv.masks import Full, Mask, Window
from qkv.models.stack import Repeat
from qkv.models.transformer import TransformerConfig
from qkv.nn.activations import ActivationName
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PostNormConfig, PreNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import FFNConfig, GLUConfig
from qkv.nn.heads import LMHeadConfig, TransformConfig
from qkv.nn.norms import LayerNormConfig, NoNormConfig
from qkv.nn.positions import LearnedPositionsConfig, RoPEConfig


def bert(
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    vocab_size: int = 30_522,
    context: int = 512,
    types: int = 2,
    eps: float = 1e-12,
    unused: int = 0,
    width: int | None = None,
    activation: ActivationName = "gelu",
) -> TransformerConfig:
    """BERT (Devlin et al. 2019): post-norm, learned positions, types of tokens, a masked language model.

    RoBERTa (Liu et al. 2019) has one type and counts positions from the third on; ALBERT (Lan et al. 2020) has
    embeddings of a `width` of their own, and one layer for all.
    """
    norm = LayerNormConfig(eps=eps)
    attention = AttentionConfig(n_heads=n_heads, mask=Full(), bias=True)
    ffn = FFNConfig(d_ff=4 * d_model, activation=activation, bias=True)
    block = PostNormConfig(norm=norm, sublayers=(attention, ffn))
    shared = {} if width is None else {"shared": True}
    return TransformerConfig(
        d_model=d_model,
        embed=TokenEmbedderConfig(
            vocab_size=vocab_size,
            position=LearnedPositionsConfig(length=context, unused=unused),
            types=types,
            norm=norm,
            width=width,
        ),
        blocks=Repeat(n=n_layers, pattern=block, **shared),
        head=LMHeadConfig(bias=True, transform=TransformConfig(activation=activation, norm=norm)),
        context=context,
    )


def modernbert(
    *,
    d_model: int,
    n_rounds: int,
    n_heads: int,
    d_ff: int,
    vocab_size: int | None = 50_368,
    context: int | None = 8192,
) -> TransformerConfig:
    """ModernBERT (Warner et al. 2024): pre-norm without biases, rotary positions, GEGLU.

    A round is two layers that see 64 tokens on each side and one that sees all. Before them stands one more of the
    latter, whose attention reads the embeddings, which are normed already.
    """
    norm = LayerNormConfig(bias=False)

    def attention(mask: Mask, theta: float) -> AttentionConfig:
        return AttentionConfig(n_heads=n_heads, mask=mask, position=RoPEConfig(theta=theta))

    glu = GLUConfig(d_ff=d_ff, activation="gelu")
    whole, near = attention(Full(), 160_000.0), attention(Window(size=65), 10_000.0)
    layers = tuple(PreNormConfig(norm=norm, sublayers=(mixer, glu)) for mixer in (near, near, whole))
    first = PreNormConfig(norm=NoNormConfig(), sublayers=(whole,)), PreNormConfig(norm=norm, sublayers=(glu,))
    return TransformerConfig(
        d_model=d_model,
        embed=TokenEmbedderConfig(vocab_size=vocab_size, norm=norm),
        blocks=(*first, Repeat(n=n_rounds, pattern=layers)),
        final_norm=norm,
        head=LMHeadConfig(bias=True, transform=TransformConfig(norm=norm, bias=False)),
        context=context,
    )


_BASE = {"d_model": 768, "n_layers": 12, "n_heads": 12}
_LARGE = {"d_model": 1024, "n_layers": 24, "n_heads": 16}
_ROBERTA = {"vocab_size": 50_265, "types": 1, "eps": 1e-5, "unused": 2}

ENCODER_PRESETS: Final[dict[str, Callable[..., TransformerConfig]]] = {
    "bert-base": partial(bert, **_BASE),
    "bert-large": partial(bert, **_LARGE),
    "roberta-base": partial(bert, **_BASE, **_ROBERTA),
    "roberta-large": partial(bert, **_LARGE, **_ROBERTA),
    "albert-base": partial(bert, **_BASE, vocab_size=30_000, width=128, activation="gelu_tanh"),
    "encoder-small": partial(modernbert, d_model=128, n_rounds=1, n_heads=2, d_ff=256, vocab_size=None, context=None),
    "modernbert-base": partial(modernbert, d_model=768, n_rounds=7, n_heads=12, d_ff=1152),
    "modernbert-large": partial(modernbert, d_model=1024, n_rounds=9, n_heads=16, d_ff=2624),
}
