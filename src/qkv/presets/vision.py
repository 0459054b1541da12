"""Models of pictures as plain data."""

from collections.abc import Callable
from functools import partial
from typing import Final

from qkv.masks import Full
from qkv.models.init import InitConfig
from qkv.models.stack import Repeat
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.embedders import PatchEmbedderConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.heads import ClassHeadConfig
from qkv.nn.norms import LayerNormConfig
from qkv.nn.pooling import MeanPoolConfig
from qkv.nn.positions import SinusoidalGridConfig


def vit(
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    patch: int = 16,
    channels: int | None = None,
    n_classes: int | None = None,
) -> TransformerConfig:
    """ViT (Dosovitskiy et al. 2021) as simplified by Beyer et al. 2022: sines and cosines, the mean of all tokens.

    Differs from the paper: there is no class token.
    """
    norm = LayerNormConfig(eps=1e-6)
    attention = AttentionConfig(n_heads=n_heads, mask=Full(), bias=True)
    block = PreNormConfig(norm=norm, sublayers=(attention, FFNConfig(d_ff=4 * d_model, bias=True)))
    return TransformerConfig(
        d_model=d_model,
        embed=PatchEmbedderConfig(patch=patch, channels=channels, position=SinusoidalGridConfig()),
        blocks=Repeat(n=n_layers, pattern=block),
        final_norm=norm,
        head=ClassHeadConfig(n_classes=n_classes, pool=MeanPoolConfig()),
        init=InitConfig(std=None),  # of 0.02 the map of patches would be lost beside the positions
    )


VISION_PRESETS: Final[dict[str, Callable[..., TransformerConfig]]] = {
    "vit-small": partial(vit, d_model=64, n_layers=3, n_heads=4, patch=2),
    "vit-ti16": partial(vit, d_model=192, n_layers=12, n_heads=3),
    "vit-s16": partial(vit, d_model=384, n_layers=12, n_heads=6),
    "vit-b16": partial(vit, d_model=768, n_layers=12, n_heads=12),
    "vit-l16": partial(vit, d_model=1024, n_layers=24, n_heads=16),
}
