"""SigLIP, SigLIP 2 and CLIP: a tower of texts, one of pictures. What tells the families apart is a table."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch

from qkv.checkpoints.families.config_reader import ConfigReader, Key, read_keys
from qkv.checkpoints.families.family import Family, layers_of, renamed, say, stack, sublayer, with_widths
from qkv.checkpoints.families.vision import sides
from qkv.checkpoints.maps import Flatten, Fuse, KeyMap, Operation, Rule, ShapeError, Split, Tensors, fuse_qkv
from qkv.errors import ConfigError, FileError
from qkv.masks import Causal, Full
from qkv.models.transformer import TransformerConfig
from qkv.models.two_towers import (
    ContrastConfig,
    SigmoidContrastConfig,
    SoftmaxContrastConfig,
    TwoTowersConfig,
)
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.embedders import PatchEmbedderConfig, TokenEmbedderConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.heads import EmbeddingHeadConfig
from qkv.nn.norms import LayerNormConfig
from qkv.nn.pooling import AttentionPoolConfig, FirstTokenConfig, LastTokenConfig
from qkv.nn.positions import GridResizeConfig, LearnedGridConfig, LearnedPositionsConfig

_KEYS: Final = (
    Key("hidden_size", "model.d_model", int, 768),
    Key("num_hidden_layers", "model.n_layers", int, 12),
    Key("num_attention_heads", "attention.n_heads", int, 12),
    Key("attention_dropout", "attention.weight_dropout", float, 0.0),
    Key("intermediate_size", "ffn.d_ff", int, 3072),
    Key("hidden_act", "ffn.activation", str, "gelu_pytorch_tanh"),
    Key("layer_norm_eps", "norm.eps", float, 1e-6),
)
_TEXT_KEYS: Final = (
    *_KEYS,
    Key("vocab_size", "embed.vocab_size", int, 32_000),
    Key("max_position_embeddings", "model.places", int, 64),
)
_PICTURE_KEYS: Final = (*_KEYS, Key("num_channels", "embed.channels", int, 3))
_HARMLESS: Final = (
    "dropout", "initializer_factor", "logit_scale_init_value", "projection_dim", "text_config_dict",
    "vision_config_dict",
)  # fmt: skip
_BOTH: Final = ("weight", "bias")


@final
@dataclass(frozen=True)
class Towers:
    """How a family differs from its relatives.

    Attributes:
        name: Its `model_type`.
        stem: What the names of its classes begin with.
        contrast: Its loss.
        free: Whether pictures keep their shape, and a config gives the number of positions (NaFlex).
        clip: Whether it is CLIP: a class token, norms of embeddings, a causal text tower, maps to a width of their own.
        text: What Hugging Face takes where the config of texts leaves a key out.
        picture: The same of pictures.
        patch: Pixels of a side of a patch, where a config does not say.
    """

    name: str
    stem: str
    contrast: ContrastConfig
    free: bool = False
    clip: bool = False
    text: Mapping[str, Any] = field(default_factory=dict)
    picture: Mapping[str, Any] = field(default_factory=dict)
    patch: int = 16

    @property
    def resize(self) -> GridResizeConfig:
        """How its grid of positions is resized."""
        return GridResizeConfig(kind="bilinear", antialias=True) if self.free else GridResizeConfig()

    def family(self) -> Family:
        """The family of this table."""
        return Family(
            read=functools.partial(_read, self),
            keys=functools.partial(_keys, self),
            prefix="",
            head="",
            table="",
            name=self.name,
            draft=functools.partial(_draft, self),
            of=TwoTowersConfig,
        )


# --- in and out -----------------------------------------------------------------------------------------------------


def _read(spec: Towers, source: ConfigReader) -> TwoTowersConfig:
    width = source.take_positive("projection_dim", 512) if spec.clip else None
    texts, pictures = (_inner(source, f"{part}_config") for part in ("text", "vision"))
    text, picture = _read_text(spec, texts, width), _read_picture(spec, pictures, width)
    source.finish(*_HARMLESS)
    return TwoTowersConfig(text=text, picture=picture, contrast=spec.contrast)


def _inner(source: ConfigReader, key: str) -> ConfigReader:
    """The config of a tower; older files of CLIP have it under another key, which counts alone where it is there."""
    usual, older = source.take(key, dict, {}), source.optional(f"{key}_dict", dict)
    return ConfigReader(usual if older is None else older, f"{source.source}, {key}")


def _tower(made: Any, mask: Full | Causal, **more: Any) -> dict[str, Any]:
    """What both towers have: equal pre-norm blocks, and a norm after the last."""
    norm = LayerNormConfig(**made["norm"])
    attention = AttentionConfig(mask=mask, bias=True, **made["attention"])
    block = PreNormConfig(norm=norm, sublayers=(attention, FFNConfig(bias=True, **made["ffn"])))
    d_model, n_layers = made["model"]["d_model"], made["model"]["n_layers"]
    return {"d_model": d_model, "blocks": stack([block] * n_layers), "final_norm": norm} | more


def _read_text(spec: Towers, source: ConfigReader, width: int | None) -> TransformerConfig:
    made = read_keys(source, _TEXT_KEYS, spec.text)
    if not spec.clip:
        width = source.optional_count("projection_size") or made["model"]["d_model"]
    source.finish(*_HARMLESS)
    places = made["model"]["places"]
    return TransformerConfig(
        embed=TokenEmbedderConfig(position=LearnedPositionsConfig(length=places), **made["embed"]),
        head=EmbeddingHeadConfig(pool=LastTokenConfig(), width=width, bias=not spec.clip),
        context=places,
        **_tower(made, Causal() if spec.clip else Full()),
    )


def _read_picture(spec: Towers, source: ConfigReader, width: int | None) -> TransformerConfig:
    made = read_keys(source, _PICTURE_KEYS, spec.picture)
    patch, other = sides(source, "patch_size", spec.patch)
    if patch != other:
        raise FileError(f"{source.source}: patches of {patch} x {other} pixels; qkv reads square ones")
    if spec.free:
        rows = columns = int(source.take_positive("num_patches", 256) ** 0.5)
    else:
        rows, columns = (side // patch for side in sides(source, "image_size", 224))
    source.require("vision_use_head", value=True)
    source.finish(*_HARMLESS)
    norm, ffn = LayerNormConfig(**made["norm"]), FFNConfig(bias=True, **made["ffn"])
    attention_pool = AttentionPoolConfig(n_heads=made["attention"]["n_heads"], norm=norm, ffn=ffn)
    return TransformerConfig(
        embed=PatchEmbedderConfig(
            patch=patch,
            prefix=1 if spec.clip else 0,
            bias=not spec.clip,
            norm=norm if spec.clip else None,
            position=LearnedGridConfig(rows=rows, columns=columns, resize=spec.resize),
            **made["embed"],
        ),
        head=EmbeddingHeadConfig(pool=FirstTokenConfig() if spec.clip else attention_pool, width=width),
        **_tower(made, Full()),
    )


def _draft(spec: Towers, config: TwoTowersConfig) -> dict[str, Any]:
    text, picture = config.text, config.picture
    tokens, patches = text.embed, picture.embed
    if not isinstance(tokens, TokenEmbedderConfig) or not isinstance(tokens.position, LearnedPositionsConfig):
        raise ConfigError("text.embed is no table of tokens with a table of positions")
    if not isinstance(patches, PatchEmbedderConfig) or not isinstance(grid := patches.position, LearnedGridConfig):
        raise ConfigError("picture.embed is none of patches with a learned grid of positions")
    assert isinstance(text.head, EmbeddingHeadConfig)
    assert isinstance(picture.head, EmbeddingHeadConfig)
    texts = _said(text, _TEXT_KEYS) | {"model_type": f"{spec.name}_text_model"}
    pictures = _said(picture, _PICTURE_KEYS) | {"model_type": f"{spec.name}_vision_model", "patch_size": patches.patch}
    size = [grid.rows * patches.patch, grid.columns * patches.patch]
    pictures |= {"num_patches": grid.rows * grid.columns} if spec.free else {"image_size": size[0]}
    if size[0] != size[1]:
        raise ConfigError(f"its grid of positions is {grid.rows} x {grid.columns}, and there it is square")
    data: dict[str, Any] = {"model_type": spec.name, "architectures": [f"{spec.stem}Model"]}
    if spec.clip:  # of the id 2 it takes it that a text ends with the highest id
        data["projection_dim"] = width = text.head.width
        texts |= {"projection_dim": width, "eos_token_id": 2}
        pictures["projection_dim"] = width
    else:
        texts["projection_size"] = text.head.width
    return data | {"text_config": texts, "vision_config": pictures}


def _said(tower: TransformerConfig, keys: tuple[Key, ...]) -> dict[str, Any]:
    """What the keys say of a tower."""
    layers = layers_of(tower)
    first = with_widths(layers[0], tower.d_model)
    parts = {"model": tower, "embed": tower.embed, "attention": sublayer(first, 0, AttentionConfig),
             "ffn": sublayer(first, 1, FFNConfig), "norm": first.norm}  # fmt: skip
    return say(keys, parts, {"model.n_layers": len(layers), "model.places": tower.longest})


# --- keys -----------------------------------------------------------------------------------------------------------


def _keys(spec: Towers, config: TwoTowersConfig) -> KeyMap:
    text, picture = config.text, config.picture
    patches = picture.embed
    assert isinstance(patches, PatchEmbedderConfig)
    shape, there = (patches.channels or 0, patches.patch, patches.patch), "vision_model.embeddings"
    table, grid = f"{there}.position_embedding.weight", "picture.embed.position.weight"
    rules = [
        Rule("text_model.embeddings.token_embedding.weight", "text.embed.weight"),
        Rule("text_model.embeddings.position_embedding.weight", "text.embed.position.weight"),
        *renamed("text_model.final_layer_norm", "text.final_norm"),
        Rule(
            f"{there}.patch_embedding.weight",
            "picture.embed.proj.weight",
            ChannelsLast(shape[0]) if spec.free else Flatten(shape),
        ),
        *renamed("vision_model.post_layernorm", "picture.final_norm"),
        *_layers(text, "text_model", "text"),
        *_layers(picture, "vision_model", "picture"),
    ]
    if spec.clip:
        rules += [
            Rule((f"{there}.class_embedding", table), ("picture.embed.prefix", grid), ClassToken()),
            *renamed("vision_model.pre_layrnorm", "picture.embed.norm"),
            Rule("text_projection.weight", "text.head.proj.weight"),
            Rule("visual_projection.weight", "picture.head.proj.weight"),
            Rule("logit_scale", "head.log_scale"),
        ]
    else:
        rules += [
            Rule(table, grid),
            Rule(f"{there}.patch_embedding.bias", "picture.embed.proj.bias"),
            *renamed("text_model.head", "text.head.proj"),
            *_attention_pool(picture),
            Rule("logit_scale", "head.log_scale", Scalar()),
            Rule("logit_bias", "head.bias", Scalar()),
        ]
    return KeyMap(rules, 0, ignore=("text_model.embeddings.position_ids", f"{there}.position_ids"))


def _layers(tower: TransformerConfig, theirs: str, ours: str) -> list[Rule]:
    rules = list[Rule]()
    for i, block in enumerate(layers_of(tower)):
        n_heads, layer, here = (
            sublayer(block, 0, AttentionConfig).n_heads,
            f"{theirs}.encoder.layers.{i}",
            f"{ours}.blocks.{i}",
        )
        fuse = fuse_qkv(n_heads, n_heads, *(tower.d_model // n_heads,) * 2)
        for part in _BOTH:
            three = tuple(f"{layer}.self_attn.{x}_proj.{part}" for x in "qkv")
            rules.append(Rule(three, f"{here}.sublayers.attention.qkv_proj.{part}", fuse))
        rules += renamed(f"{layer}.self_attn.out_proj", f"{here}.sublayers.attention.o_proj")
        rules += renamed(f"{layer}.mlp.fc1", f"{here}.sublayers.ffn.up_proj")
        rules += renamed(f"{layer}.mlp.fc2", f"{here}.sublayers.ffn.down_proj")
        rules += renamed(f"{layer}.layer_norm1", f"{here}.norms.attention")
        rules += renamed(f"{layer}.layer_norm2", f"{here}.norms.ffn")
    return rules


def _attention_pool(tower: TransformerConfig) -> list[Rule]:
    theirs, ours, d_model = "vision_model.head", "picture.head.pool", tower.d_model
    assert isinstance(tower.head, EmbeddingHeadConfig)
    assert isinstance(tower.head.pool, AttentionPoolConfig)
    read = ReadingHeads(tower.head.pool.n_heads)
    return [
        Rule(f"{theirs}.probe", f"{ours}.probe", Flatten((1, d_model))),
        *(
            Rule(
                f"{theirs}.attention.in_proj_{part}",
                (f"{ours}.attention.q_proj.{part}", f"{ours}.attention.kv_proj.{part}"),
                Split((d_model,) * 3),
                read,
            )
            for part in _BOTH
        ),
        *renamed(f"{theirs}.attention.out_proj", f"{ours}.attention.o_proj"),
        *renamed(f"{theirs}.layernorm", f"{ours}.norm"),
        *renamed(f"{theirs}.mlp.fc1", f"{ours}.ffn.up_proj"),
        *renamed(f"{theirs}.mlp.fc2", f"{ours}.ffn.down_proj"),
    ]


@final
@dataclass(frozen=True)
class ReadingHeads(Operation):
    """Queries, and keys and values, of which the latter two take turns head by head."""

    n_heads: int

    def forward(self, theirs: Tensors) -> Tensors:
        q, k, v = theirs
        return q, *self._fuse(len(k)).forward((k, v))

    def inverse(self, ours: Tensors) -> Tensors:
        q, kv = ours
        return q, *self._fuse(len(kv) // 2).inverse((kv,))

    def _fuse(self, width: int) -> Fuse:
        return Fuse((width // self.n_heads,) * 2, self.n_heads)


@final
class Scalar(Operation):
    """A vector of one number, to that number."""

    def forward(self, theirs: Tensors) -> Tensors:
        if theirs[0].shape != (1,):
            raise ShapeError(f"found {tuple(theirs[0].shape)}, needs (1,)")
        return (theirs[0].reshape(()),)

    def inverse(self, ours: Tensors) -> Tensors:
        return (ours[0].reshape(1),)


@final
class ClassToken(Operation):
    """A trained token and a table whose first row is its position, to both apart; that is 0 on the way back."""

    def forward(self, theirs: Tensors) -> Tensors:
        token, table = theirs
        if token.ndim != 1 or table.ndim != 2 or token.shape != table.shape[1:] or not len(table):
            raise ShapeError(f"found {tuple(token.shape)} and {tuple(table.shape)}, needs (width) and (places, width)")
        return (token + table[0])[None], table[1:]

    def inverse(self, ours: Tensors) -> Tensors:
        prefix, table = ours
        return prefix[0], torch.cat([torch.zeros_like(prefix), table])


@final
@dataclass(frozen=True)
class ChannelsLast(Operation):
    """A map of patches that are given pixel by pixel, to one of patches channel by channel."""

    channels: int

    def forward(self, theirs: Tensors) -> Tensors:
        (weight,) = theirs
        if weight.ndim != 2 or weight.shape[1] % self.channels:
            raise ShapeError(f"found {tuple(weight.shape)}, needs (width, a multiple of {self.channels})")
        return (weight.unflatten(1, (-1, self.channels)).transpose(1, 2).flatten(1),)

    def inverse(self, ours: Tensors) -> Tensors:
        (weight,) = ours
        return (weight.unflatten(1, (self.channels, -1)).transpose(1, 2).flatten(1),)


# --- the families ---------------------------------------------------------------------------------------------------

SIGLIP: Final = Towers(name="siglip", stem="Siglip", contrast=SigmoidContrastConfig())
"""Zhai et al. 2023; SigLIP 2 (Tschannen et al. 2025) with pictures of one size."""

SIGLIP2: Final = Towers(name="siglip2", stem="Siglip2", contrast=SigmoidContrastConfig(), free=True)
"""Tschannen et al. 2025, section 2.4.2 ("NaFlex"): pictures keep their shape."""

_OLDER: Final = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
CLIP: Final = Towers(
    name="clip",
    stem="CLIP",
    contrast=SoftmaxContrastConfig(),
    clip=True,
    text=_OLDER
    | {
        "vocab_size": 49_408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
    },
    picture=_OLDER,
    patch=32,
)
"""Radford et al. 2021."""

TWO_TOWERS: Final = (SIGLIP, SIGLIP2, CLIP)
