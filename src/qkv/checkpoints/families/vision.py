"""ViT and its relatives: pictures with a class token and a grid of positions. What tells them apart is a table."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch

from qkv.checkpoints.families.config_reader import ConfigReader, Key, read_keys
from qkv.checkpoints.families.encoder_heads import BODY, HeadKeys, Heads
from qkv.checkpoints.families.family import Family, layers_of, renamed, say, stack, sublayer, with_widths
from qkv.checkpoints.maps import Flatten, KeyMap, Operation, Rule, ShapeError, Split, Tensors, fuse_glu, fuse_qkv
from qkv.errors import ConfigError, FileError
from qkv.masks import Full
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.embedders import PatchEmbedderConfig
from qkv.nn.ffn import FFNConfig, GLUConfig
from qkv.nn.heads import ClassHeadConfig, TransformConfig
from qkv.nn.norms import LayerNormConfig
from qkv.nn.pooling import ConcatPoolConfig, FirstTokenConfig, MeanPoolConfig
from qkv.nn.positions import GridResizeConfig, LearnedGridConfig

IMAGES, TEACHER = "ForImageClassification", "ForImageClassificationWithTeacher"
_BOTH: Final = ConcatPoolConfig(pools=(FirstTokenConfig(), FirstTokenConfig(skip=1)))
"""The class token and that of distillation (Touvron et al. 2021, section 4), whose logits are averaged."""

_BICUBIC: Final = GridResizeConfig()

_KEYS: Final = (
    Key("hidden_size", "model.d_model", int, 768),
    Key("num_hidden_layers", "model.n_layers", int, 12),
    Key("num_channels", "embed.channels", int, 3),
    Key("hidden_dropout_prob", "embed.dropout", float, 0.0),
    Key("num_attention_heads", "attention.n_heads", int, 12),
    Key("qkv_bias", "attention.bias", bool, True),
    Key("attention_probs_dropout_prob", "attention.weight_dropout", float, 0.0),
    Key("hidden_act", "ffn.activation", str, "gelu"),
    Key("layer_norm_eps", "norm.eps", float, 1e-12),
)
_VIT_KEYS: Final = (
    *_KEYS,
    Key("intermediate_size", "ffn.d_ff", int, 3072),
    Key("pooler_act", "pooler.activation", str, "tanh"),
)
_DINO_KEYS: Final = (
    *_KEYS,
    Key("mlp_ratio", "model.ratio", int, 4),
    Key("layerscale_value", "block.layer_scale", float, 1.0),
    Key("drop_path_rate", "block.drop_path", float, 0.0),
)


@final
@dataclass(frozen=True)
class Names:
    """Keys within a layer, of what differs."""

    up_proj: str = "intermediate.dense"
    down_proj: str = "output.dense"
    attention_norm: str = "layernorm_before"
    ffn_norm: str = "layernorm_after"


@final
@dataclass(frozen=True)
class Vision:
    """How a family differs from its relatives.

    Attributes:
        name: Its `model_type`.
        heads: Its heads.
        tokens: The keys of the trained tokens that have a position: each is one token.
        registers: Tokens without a position behind them, where a config does not say; None: there are none.
        resize: How its grid of positions is resized.
        keys: Of its config.
        names: Within a layer.
        patch: Pixels of a side of a patch, where a config does not say.
        defaults: What Hugging Face takes where a file leaves a key out.
    """

    name: str
    heads: Heads
    tokens: tuple[str, ...] = ("cls_token",)
    registers: int | None = None
    resize: GridResizeConfig = _BICUBIC
    keys: tuple[Key, ...] = _VIT_KEYS
    names: Names = Names()
    patch: int = 16
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """What stands before every key but those of heads."""
        return f"{self.name}."

    @property
    def dino(self) -> bool:
        """Whether it has LayerScale, stochastic depth, and FFNs by ratio."""
        return self.keys is _DINO_KEYS

    def family(self) -> Family:
        """The family of this table."""
        return Family(
            read=functools.partial(_read, self),
            keys=functools.partial(_keys, self),
            prefix=self.prefix,
            head="",
            table="",
            name=self.name,
            draft=functools.partial(_draft, self),
        )


# --- in and out -----------------------------------------------------------------------------------------------------


def _read(spec: Vision, source: ConfigReader) -> TransformerConfig:
    made = read_keys(source, spec.keys, spec.defaults)
    model, norm, dropout = made["model"], LayerNormConfig(**made["norm"]), made["embed"]["dropout"]
    d_model = model["d_model"]
    patch, other = sides(source, "patch_size", spec.patch)
    if patch != other:
        raise FileError(f"{source.source}: patches of {patch} x {other} pixels; qkv reads square ones")
    rows, columns = (side // patch for side in sides(source, "image_size", 224))
    prefix = len(spec.tokens)
    if spec.registers is not None:
        prefix += source.take("num_register_tokens", int, spec.registers)
    attention = AttentionConfig(mask=Full(), out_bias=True, dropout=0.0 if spec.dino else dropout, **made["attention"])
    source.require("pooler_output_size", d_model)
    head = spec.heads.read(
        source,
        masked=TransformConfig(),
        pooled=TransformConfig(**made["pooler"]),
        pool=ConcatPoolConfig(pools=(FirstTokenConfig(), MeanPoolConfig(skip=prefix))) if spec.dino else None,
    )
    inner: FFNConfig | GLUConfig
    if spec.dino and source.take("use_swiglu_ffn", bool, False):
        inner = GLUConfig(d_ff=_swiglu_width(d_model, model["ratio"]), bias=True)
    elif spec.dino:
        inner = FFNConfig(d_ff=d_model * model["ratio"], bias=True, **made["ffn"])
    else:
        inner = FFNConfig(bias=True, dropout=dropout, **made["ffn"])
    source.finish(
        "apply_layernorm", "encoder_stride", "out_features", "out_indices", "reshape_hidden_states", "stage_names",
        "use_mask_token",
    )  # fmt: skip
    block = PreNormConfig(norm=norm, sublayers=(attention, inner), **made["block"])
    return TransformerConfig(
        d_model=d_model,
        embed=PatchEmbedderConfig(
            patch=patch,
            prefix=prefix,
            position=LearnedGridConfig(rows=rows, columns=columns, resize=spec.resize),
            **made["embed"],
        ),
        blocks=stack([block] * model["n_layers"]),
        final_norm=norm,
        head=head,
    )


def sides(source: ConfigReader, key: str, default: int) -> tuple[int, int]:
    """Height and width, of which a file gives both or one for both."""
    match source.take(key, object, default):
        case int(side) if side > 0:
            return side, side
        case [int(height), int(width)] if height > 0 and width > 0:
            return height, width
        case other:
            raise FileError(
                f"{source.source}: {key!r} is {other!r} and must be a number of pixels, or two; fix the file"
            )


def _swiglu_width(d_model: int, ratio: int) -> int:
    return (d_model * ratio * 2 // 3 + 7) // 8 * 8


def _draft(spec: Vision, config: TransformerConfig) -> dict[str, Any]:
    embed, layers, head = config.embed, layers_of(config), config.head
    if not isinstance(embed, PatchEmbedderConfig) or not isinstance(grid := embed.position, LearnedGridConfig):
        raise ConfigError("its embedder is none of patches with a learned grid of positions")
    first = with_widths(layers[0], config.d_model)
    if len(first.sublayers) != 2:
        raise ConfigError(f"a block has {len(first.sublayers)} sublayers, and this family's have 2")
    inner = first.sublayers[1]
    if not isinstance(inner, GLUConfig if spec.dino and isinstance(inner, GLUConfig) else FFNConfig):
        raise ConfigError(f"sublayer 2 of a block is {inner.tag()}, and this family has FFN")
    transform = head.transform if isinstance(head, ClassHeadConfig) else None
    parts = {"model": config, "embed": embed, "attention": sublayer(first, 0, AttentionConfig), "ffn": inner,
             "norm": first.norm, "block": first, "pooler": transform or TransformConfig(activation="tanh")}  # fmt: skip
    d_ff, d_model = inner.d_ff or 0, config.d_model
    ratio = max(1, d_ff // d_model)
    data: dict[str, Any] = {"model_type": spec.name}
    if spec.dino:
        if gated := isinstance(inner, GLUConfig):
            ratio = next((n for n in range(1, d_ff) if _swiglu_width(d_model, n) >= d_ff), 1)
        # The rest of the mask that others were trained with, and which is of no use afterwards.
        data |= {"use_swiglu_ffn": gated} | ({"use_mask_token": False} if spec.registers is None else {})
    size = [grid.rows * embed.patch, grid.columns * embed.patch]
    data |= say(spec.keys, parts, {"model.n_layers": len(layers), "model.ratio": ratio})
    data |= {"patch_size": embed.patch, "image_size": size[0] if size[0] == size[1] else size}
    if spec.registers is not None:
        data["num_register_tokens"] = max(0, embed.prefix - len(spec.tokens))
    return data | spec.heads.write(head)


def _keys(spec: Vision, config: TransformerConfig) -> KeyMap:
    embed, names, d_model = config.embed, spec.names, config.d_model
    assert isinstance(embed, PatchEmbedderConfig)
    there, patch, head = f"{spec.prefix}embeddings", embed.patch, config.head
    tokens, sizes = list(spec.tokens), [1] * len(spec.tokens)
    if registers := embed.prefix - len(spec.tokens):
        tokens, sizes = [*tokens, "register_tokens"], [*sizes, registers]
    masked = [] if spec.registers is None else ["mask_token"]  # their module has it, whatever the config says
    trained = tuple(f"{there}.{key}" for key in (*tokens, "position_embeddings", *masked))
    conv = f"{there}.patch_embeddings.projection"
    rules = [
        Rule(f"{conv}.weight", "embed.proj.weight", Flatten((embed.channels or 0, patch, patch))),
        Rule(f"{conv}.bias", "embed.proj.bias"),
        Rule(trained, ("embed.prefix", "embed.position.weight"), Places(tuple(sizes), len(spec.tokens), bool(masked))),
        *renamed(f"{spec.prefix}layernorm", "final_norm"),
        *spec.heads.rules(head),
    ]
    if isinstance(head, ClassHeadConfig) and head.pool == _BOTH:
        rules += [
            Rule((f"cls_classifier.{part}", f"distillation_classifier.{part}"), f"head.proj.{part}", Average())
            for part in ("weight", "bias")
        ]
    for i, block in enumerate(layers_of(config)):
        theirs, ours = f"{spec.prefix}encoder.layer.{i}", f"blocks.{i}"
        attention, inner = sublayer(block, 0, AttentionConfig), block.sublayers[1]
        head_dim = attention.head_dim or d_model // attention.n_heads
        fuse = fuse_qkv(attention.n_heads, attention.n_heads, head_dim, head_dim)
        for part in ("weight", "bias") if attention.bias else ("weight",):
            three = tuple(f"{theirs}.attention.attention.{x}.{part}" for x in ("query", "key", "value"))
            rules.append(Rule(three, f"{ours}.sublayers.attention.qkv_proj.{part}", fuse))
        rules += renamed(f"{theirs}.attention.output.dense", f"{ours}.sublayers.attention.o_proj")
        if isinstance(inner, GLUConfig):
            d_ff, into = inner.width(d_model), f"{ours}.sublayers.ffn.gate_up_proj"
            halves = Split((d_ff, d_ff)), fuse_glu(d_ff)
            rules += [Rule(f"{theirs}.mlp.weights_in.{x}", f"{into}.{x}", *halves) for x in ("weight", "bias")]
            rules += renamed(f"{theirs}.mlp.weights_out", f"{ours}.sublayers.ffn.down_proj")
        else:
            rules += renamed(f"{theirs}.{names.up_proj}", f"{ours}.sublayers.ffn.up_proj")
            rules += renamed(f"{theirs}.{names.down_proj}", f"{ours}.sublayers.ffn.down_proj")
        rules += renamed(f"{theirs}.{names.attention_norm}", f"{ours}.norms.attention")
        rules += renamed(f"{theirs}.{names.ffn_norm}", f"{ours}.norms.ffn")
        if spec.dino:
            rules.append(Rule(f"{theirs}.layer_scale1.lambda1", f"{ours}.factors.attention"))
            rules.append(Rule(f"{theirs}.layer_scale2.lambda1", f"{ours}.factors.ffn"))
    heads = [keys for each in spec.heads.keys.values() for keys in (each.dense, each.out) if keys]
    ignore = () if masked else (f"{there}.mask_token",)
    return KeyMap(rules, 0, ignore=ignore, unused=[f"{name}.{part}" for name in heads for part in ("weight", "bias")])


@final
@dataclass(frozen=True)
class Places(Operation):
    """Trained tokens and a table whose first rows are the positions of some of them, to both apart.

    Such a position is added to its token. On the way back it is 0, which gives the same sum.

    Attributes:
        sizes: Tokens of each of their tensors.
        placed: How many of them, from the first, have a position.
        masked: Whether a mask token comes last, which is dropped, and comes back as zeros.
    """

    sizes: tuple[int, ...]
    placed: int
    masked: bool

    def forward(self, theirs: Tensors) -> Tensors:
        *tokens, table = theirs[: len(self.sizes) + 1]
        if any(x.ndim != 3 or len(x) != 1 for x in (*tokens, table)) or table.shape[1] < self.placed:
            raise ShapeError(f"found {', '.join(str(tuple(x.shape)) for x in theirs)}, needs (1, tokens, width) each")
        prefix = torch.cat(tokens, 1)[0].clone()
        prefix[: self.placed] += table[0, : self.placed]
        return prefix, table[0, self.placed :]

    def inverse(self, ours: Tensors) -> Tensors:
        prefix, table = ours
        places = torch.cat([torch.zeros_like(table[:1]).expand(self.placed, -1), table])[None]
        mask = (torch.zeros_like(prefix[:1]),) if self.masked else ()
        return (*(part[None] for part in prefix.split(self.sizes)), places, *mask)


@final
class Average(Operation):
    """Two linear maps whose results are averaged, to one of both inputs side by side; the biases come back equal."""

    def forward(self, theirs: Tensors) -> Tensors:
        a, b = theirs
        return (torch.cat([a, b], 1) / 2 if a.ndim == 2 else (a + b) / 2,)

    def inverse(self, ours: Tensors) -> Tensors:
        (both,) = ours
        a, b = (2 * both).chunk(2, 1) if both.ndim == 2 else (both, both.clone())
        return a, b


# --- the families ---------------------------------------------------------------------------------------------------


def _heads(stem: str, prefix: str, more: Mapping[str, HeadKeys], *, pooler: bool) -> Heads:
    body = HeadKeys(dense=f"{prefix}.pooler.dense") if pooler else HeadKeys()
    keys = {BODY: body, IMAGES: HeadKeys(out="classifier"), **more}
    return Heads(stem, keys, dropout=None, whole=IMAGES, pools={TEACHER: _BOTH} if TEACHER in more else {})


VIT: Final = Vision(name="vit", heads=_heads("ViT", "vit", {}, pooler=True))
"""Dosovitskiy et al. 2021."""

DEIT: Final = Vision(
    name="deit",
    heads=_heads("DeiT", "deit", {TEACHER: HeadKeys()}, pooler=True),
    tokens=("cls_token", "distillation_token"),
)
"""Touvron et al. 2021, with distillation."""


def _dino(name: str, stem: str, patch: int, registers: int | None, resize: GridResizeConfig) -> Vision:
    return Vision(
        name=name,
        heads=_heads(stem, name, {}, pooler=False),
        registers=registers,
        resize=resize,
        keys=_DINO_KEYS,
        names=Names("mlp.fc1", "mlp.fc2", "norm1", "norm2"),
        patch=patch,
        defaults={"layer_norm_eps": 1e-6},
    )


DINOV2: Final = _dino("dinov2", "Dinov2", 14, None, _BICUBIC)
"""Oquab et al. 2023."""

DINOV2_WITH_REGISTERS: Final = _dino(
    "dinov2_with_registers", "Dinov2WithRegisters", 16, 4, GridResizeConfig(antialias=True)
)
"""Darcet et al. 2024."""

VISION: Final[Sequence[Vision]] = (VIT, DEIT, DINOV2, DINOV2_WITH_REGISTERS)
