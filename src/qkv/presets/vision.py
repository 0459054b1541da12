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
from qkv.nn.pooling import ConcatPoolConfig, FirstTokenConfig, MeanPoolConfig
from qkv.nn.positions import CentredRoPEConfig, GridResizeConfig, LearnedGridConfig, SinusoidalGridConfig


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
    block = _block(d_model, n_heads, LayerNormConfig(eps=1e-6))
    return TransformerConfig(
        d_model=d_model,
        embed=PatchEmbedderConfig(patch=patch, channels=channels, position=SinusoidalGridConfig()),
        blocks=Repeat(n=n_layers, pattern=block),
        final_norm=block.norm,
        head=ClassHeadConfig(n_classes=n_classes, pool=MeanPoolConfig()),
        init=_INIT,
    )


def deit(
    *,
    d_model: int,
    n_heads: int,
    n_layers: int = 12,
    patch: int = 16,
    side: int = 14,
    channels: int | None = None,
    n_classes: int | None = None,
    drop_path: float = 0.0,
) -> TransformerConfig:
    """DeiT (Touvron et al. 2021, section 4): a class token and one that learns from a teacher; both are read.

    `side` is that of the trained grid, in patches. `drop_path` is that of the last layer, to which it rises in a line.
    """
    block = _block(d_model, n_heads, LayerNormConfig(eps=1e-12))
    grid = LearnedGridConfig(rows=side, columns=side, resize=GridResizeConfig())
    pool = ConcatPoolConfig(pools=(FirstTokenConfig(), FirstTokenConfig(skip=1)))
    return TransformerConfig(
        d_model=d_model,
        embed=PatchEmbedderConfig(patch=patch, channels=channels, prefix=2, position=grid),
        blocks=_layers(block, n_layers, drop_path),
        final_norm=block.norm,
        head=ClassHeadConfig(n_classes=n_classes, pool=pool),
        init=_INIT,
    )


def dinov2(
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    registers: int = 0,
    patch: int = 14,
    side: int = 37,
    channels: int | None = None,
    n_classes: int | None = None,
    layer_scale: float = 1.0,
    drop_path: float = 0.0,
) -> TransformerConfig:
    """DINOv2 (Oquab et al. 2023), with `registers` (Darcet et al. 2024: 4), and its linear classifier.

    That reads the class token and the mean of the patches. `side` and `drop_path` as in `deit`.
    """
    block = _block(d_model, n_heads, LayerNormConfig(eps=1e-6)).replace(layer_scale=layer_scale)
    grid = LearnedGridConfig(rows=side, columns=side, resize=GridResizeConfig(antialias=registers > 0))
    pool = ConcatPoolConfig(pools=(FirstTokenConfig(), MeanPoolConfig(skip=1 + registers)))
    return TransformerConfig(
        d_model=d_model,
        embed=PatchEmbedderConfig(patch=patch, channels=channels, prefix=1 + registers, position=grid),
        blocks=_layers(block, n_layers, drop_path),
        final_norm=block.norm,
        head=ClassHeadConfig(n_classes=n_classes, pool=pool),
        init=_INIT,
    )


def dinov3(
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    registers: int = 4,
    patch: int = 16,
    channels: int | None = None,
    n_classes: int | None = None,
    layer_scale: float = 1.0,
    drop_path: float = 0.0,
) -> TransformerConfig:
    """DINOv3 (Siméoni et al. 2025): patches turn by where they lie in their picture; pictures of any size.

    Without `n_classes` it has no head, as published; with them one of the class token. `drop_path` as in `deit`.
    """
    block = _block(d_model, n_heads, LayerNormConfig(), CentredRoPEConfig()).replace(layer_scale=layer_scale)
    return TransformerConfig(
        d_model=d_model,
        embed=PatchEmbedderConfig(patch=patch, channels=channels, prefix=1 + registers),
        blocks=_layers(block, n_layers, drop_path),
        final_norm=block.norm,
        head=None if n_classes is None else ClassHeadConfig(n_classes=n_classes, pool=FirstTokenConfig()),
        init=_INIT,
    )


_INIT: Final = InitConfig(std=None)  # of 0.02 the map of patches would be lost beside the positions


def _block(
    d_model: int, n_heads: int, norm: LayerNormConfig, position: CentredRoPEConfig | None = None
) -> PreNormConfig:
    attention = AttentionConfig(n_heads=n_heads, mask=Full(), bias=True, position=position)
    return PreNormConfig(norm=norm, sublayers=(attention, FFNConfig(d_ff=4 * d_model, bias=True)))


def _layers(block: PreNormConfig, n: int, drop_path: float) -> Repeat | tuple[PreNormConfig, ...]:
    """Equal layers, but for stochastic depth."""
    if not drop_path:
        return Repeat(n=n, pattern=block)
    return tuple(block.replace(drop_path=drop_path * i / max(1, n - 1)) for i in range(n))


VISION_PRESETS: Final[dict[str, Callable[..., TransformerConfig]]] = {
    "vit-small": partial(vit, d_model=64, n_layers=3, n_heads=4, patch=2),
    "vit-ti16": partial(vit, d_model=192, n_layers=12, n_heads=3),
    "vit-s16": partial(vit, d_model=384, n_layers=12, n_heads=6),
    "vit-b16": partial(vit, d_model=768, n_layers=12, n_heads=12),
    "vit-l16": partial(vit, d_model=1024, n_layers=24, n_heads=16),
    "deit-ti16": partial(deit, d_model=192, n_heads=3),
    "deit-s16": partial(deit, d_model=384, n_heads=6),
    "deit-b16": partial(deit, d_model=768, n_heads=12),
    "dinov2-s14": partial(dinov2, d_model=384, n_layers=12, n_heads=6),
    "dinov2-b14": partial(dinov2, d_model=768, n_layers=12, n_heads=12),
    "dinov2-l14": partial(dinov2, d_model=1024, n_layers=24, n_heads=16),
    "dinov3-s16": partial(dinov3, d_model=384, n_layers=12, n_heads=6),
    "dinov3-b16": partial(dinov3, d_model=768, n_layers=12, n_heads=12),
    "dinov3-l16": partial(dinov3, d_model=1024, n_layers=24, n_heads=16),
}
