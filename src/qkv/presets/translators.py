"""Models of pairs as rows of plain data: recurrent ones with attention and without, and a Transformer."""

from collections.abc import Callable
from functools import partial

from qkv.masks import Causal, Full
from qkv.models.decoders import BahdanauConfig, FixedVectorConfig, LuongConfig
from qkv.models.encoder_decoder import EncoderDecoderConfig
from qkv.models.init import InitConfig
from qkv.models.pairs import PairModelConfig
from qkv.models.seq2seq import Seq2SeqConfig
from qkv.models.stack import Repeat
from qkv.nn.additive import GeneralScoreConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PostNormConfig
from qkv.nn.cross import CrossAttentionConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.heads import LMHeadConfig
from qkv.nn.norms import LayerNormConfig
from qkv.nn.positions import SinusoidalPositionsConfig


def bahdanau(d_model: int = 128) -> Seq2SeqConfig:
    """Bahdanau et al. 2015: a bidirectional GRU, additive scores of the previous state. In the paper d_model=1000."""
    return Seq2SeqConfig(d_model=d_model, decoder=BahdanauConfig())


def luong(d_model: int = 128) -> Seq2SeqConfig:
    """Luong et al. 2015 with general scores and input feeding, over GRUs."""
    return Seq2SeqConfig(d_model=d_model, decoder=LuongConfig(score=GeneralScoreConfig()))


def fixed_vector(d_model: int = 128) -> Seq2SeqConfig:
    """Cho et al. 2014: the same without attention; the source is one vector."""
    return Seq2SeqConfig(d_model=d_model, decoder=FixedVectorConfig())


def attention_is_all_you_need(
    d_model: int, n_layers: int, n_heads: int, d_ff: int, *, dropout: float = 0.1, shared: bool = False
) -> EncoderDecoderConfig:
    """Vaswani et al. 2017, section 3: post-norm, sinusoidal positions, vectors times √d_model, ReLU, smoothing 0.1.

    The paper shares the vectors of source, target and head; `shared` does so where there is one tokenizer.
    """
    embed = TokenEmbedderConfig(position=SinusoidalPositionsConfig(), scale=None, dropout=dropout)
    own = AttentionConfig(n_heads=n_heads, mask=Full(), dropout=dropout)
    past = AttentionConfig(n_heads=n_heads, mask=Causal(), dropout=dropout)
    read = CrossAttentionConfig(n_heads=n_heads, mask=Full(), dropout=dropout)
    ffn = FFNConfig(d_ff=d_ff, activation="relu", bias=True, dropout=dropout)
    norm = LayerNormConfig()
    return EncoderDecoderConfig(
        d_model=d_model,
        source=None if shared else embed,
        target=embed,
        encoder=Repeat(n=n_layers, pattern=PostNormConfig(norm=norm, sublayers=(own, ffn))),
        decoder=Repeat(n=n_layers, pattern=PostNormConfig(norm=norm, sublayers=(past, read, ffn))),
        head=LMHeadConfig(tied=True, smoothing=0.1),
        init=InitConfig(std=None, embed_std=d_model**-0.5, scale_residual=False),
    )


PAIR_PRESETS: dict[str, Callable[..., PairModelConfig]] = {
    "bahdanau": bahdanau,
    "luong": luong,
    "fixed-vector": fixed_vector,
    "translator": partial(attention_is_all_you_need, d_model=128, n_layers=2, n_heads=4, d_ff=512),
    "attention-is-all-you-need": partial(
        attention_is_all_you_need, d_model=512, n_layers=6, n_heads=8, d_ff=2048, shared=True
    ),
}
