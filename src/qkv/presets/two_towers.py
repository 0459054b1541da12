"""Models of texts and pictures as plain data."""

from collections.abc import Callable
from functools import partial
from typing import Final

from qkv.models.init import InitConfig
from qkv.models.stack import Repeat
from qkv.models.two_towers import SoftmaxContrastConfig, TwoTowersConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.heads import EmbeddingHeadConfig
from qkv.nn.pooling import AttentionPoolConfig
from qkv.nn.positions import LearnedPositionsConfig
from qkv.presets.vision import vit


def two_towers(
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    text_layers: int,
    width: int,
    patch: int = 16,
    channels: int | None = None,
    vocab_size: int | None = None,
    context: int = 64,
) -> TwoTowersConfig:
    """Small two towers after SigLIP (Zhai et al. 2023): a ViT with an attention pool, and a text encoder.

    Differs from the paper: the vector of a text is the mean of its tokens, which are not filled up to a length; the
    loss is that of CLIP, which learns faster from small batches.
    """
    picture = vit(d_model=d_model, n_layers=n_layers, n_heads=n_heads, patch=patch, channels=channels)
    assert isinstance(picture.blocks, Repeat)
    text = picture.replace(
        embed=TokenEmbedderConfig(vocab_size=vocab_size, position=LearnedPositionsConfig(length=context)),
        blocks=picture.blocks.replace(n=text_layers),
        head=EmbeddingHeadConfig(width=width),
        init=InitConfig(std=None, embed_std=0.1),
    )
    head = EmbeddingHeadConfig(pool=AttentionPoolConfig(n_heads=n_heads), width=width)
    return TwoTowersConfig(text=text, picture=picture.replace(head=head), contrast=SoftmaxContrastConfig())


TWO_TOWERS_PRESETS: Final[dict[str, Callable[..., TwoTowersConfig]]] = {
    "two-towers-small": partial(two_towers, d_model=128, n_layers=3, n_heads=4, text_layers=2, width=128, patch=8),
}
