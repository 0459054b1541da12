"""Families of language models as plain data: what differs between them, and their sizes as parameters."""

from qkv.masks import Causal, Mask, Window
from qkv.models.stack import Repeat
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import OutputNormConfig, ParallelPreNormConfig, PreNormConfig, SandwichConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import FFNConfig, GLUConfig
from qkv.nn.heads import LMHeadConfig
from qkv.nn.norms import LayerNormConfig, NormConfig, RMSNormConfig
from qkv.nn.positions import LearnedPositionsConfig, RoPEConfig


def _model(
    d_model: int,
    vocab_size: int | None,
    blocks: Repeat,
    norm: NormConfig,
    *,
    context: int | None = None,
    position: LearnedPositionsConfig | None = None,
    scale: float | None = 1.0,
    tied: bool = False,
    softcap: float | None = None,
) -> TransformerConfig:
    """Tokens in, logits out: what all of them are."""
    embed = TokenEmbedderConfig(vocab_size=vocab_size, position=position, scale=scale)
    head = LMHeadConfig(tied=tied, softcap=softcap)
    return TransformerConfig(d_model=d_model, embed=embed, blocks=blocks, final_norm=norm, head=head, context=context)


def small(
    *, d_model: int = 128, n_layers: int = 4, n_heads: int = 2, vocab_size: int | None = None
) -> TransformerConfig:
    """The default recipe's model, which learns a book on two CPU cores in minutes; None: the tokenizer's vocabulary."""
    norm = RMSNormConfig()
    attention = AttentionConfig(n_heads=n_heads, mask=Causal(), position=RoPEConfig(), qk_norm=norm)
    block = PreNormConfig(norm=norm, sublayers=(attention, GLUConfig(multiple_of=32)))
    return _model(d_model, vocab_size, Repeat(n=n_layers, pattern=block), norm, tied=True)


def gpt2(
    *, d_model: int, n_layers: int, n_heads: int, vocab_size: int = 50_257, context: int = 1024
) -> TransformerConfig:
    """GPT-2 (Radford et al. 2019): pre-norm, learned positions, tanh-GELU, biases everywhere, tied head."""
    attention = AttentionConfig(n_heads=n_heads, mask=Causal(), bias=True)
    ffn = FFNConfig(d_ff=4 * d_model, activation="gelu_tanh", bias=True)
    norm, position = LayerNormConfig(), LearnedPositionsConfig(length=context)
    blocks = Repeat(n=n_layers, pattern=PreNormConfig(norm=norm, sublayers=(attention, ffn)))
    return _model(d_model, vocab_size, blocks, norm, context=context, position=position, tied=True)


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
    """Llama (Touvron et al. 2023; Grattafiori et al. 2024): pre-RMSNorm, rotary positions, grouped queries, SwiGLU.

    Mistral and Phi-3 have another mask, Qwen 2 biases of q, k and v, and Qwen 3 norms of q and k.
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
    return _model(d_model, vocab_size, Repeat(n=n_layers, pattern=block), norm, context=context, tied=tied)


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
    """Gemma 2 (Gemma Team 2024): norms around sublayers, bounded scores and logits.

    A round is a layer with a window and one without.
    """
    norm = RMSNormConfig(eps=1e-6, offset=1.0)

    def block(mask: Mask) -> SandwichConfig:
        attention = AttentionConfig(
            n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, mask=mask, position=RoPEConfig(), softcap=50.0
        )
        return SandwichConfig(norm=norm, sublayers=(attention, GLUConfig(d_ff=d_ff, activation="gelu_tanh")))

    blocks = Repeat(n=n_rounds, pattern=(block(Causal() & Window(size=window)), block(Causal())))
    return _model(d_model, vocab_size, blocks, norm, context=context, scale=None, tied=True, softcap=30.0)


def olmo2(
    *, d_model: int, n_layers: int, n_heads: int, d_ff: int, vocab_size: int = 100_352, context: int = 4096
) -> TransformerConfig:
    """OLMo 2 (OLMo Team 2024): norms after the sublayers, and of queries and keys over all heads at once."""
    norm = RMSNormConfig(eps=1e-6)
    attention = AttentionConfig(
        n_heads=n_heads, mask=Causal(), position=RoPEConfig(theta=5e5), qk_norm=norm, qk_norm_over="heads"
    )
    block = OutputNormConfig(norm=norm, sublayers=(attention, GLUConfig(d_ff=d_ff, activation="silu")))
    return _model(d_model, vocab_size, Repeat(n=n_layers, pattern=block), norm, context=context)


def pythia(
    *, d_model: int, n_layers: int, n_heads: int, vocab_size: int = 50_304, context: int = 2048
) -> TransformerConfig:
    """Pythia (Biderman et al. 2023), a GPT-NeoX: parallel sublayers, a quarter of each head rotated."""
    norm = LayerNormConfig()
    attention = AttentionConfig(n_heads=n_heads, mask=Causal(), bias=True, position=RoPEConfig(fraction=0.25))
    ffn = FFNConfig(d_ff=4 * d_model, activation="gelu", bias=True)
    blocks = Repeat(n=n_layers, pattern=ParallelPreNormConfig(norm=norm, sublayers=(attention, ffn)))
    return _model(d_model, vocab_size, blocks, norm, context=context)
