"""DINOv3 (Siméoni et al. 2025): a class token and registers, patches turned by where they lie, LayerScale."""

from dataclasses import dataclass
from typing import Any, Final, final

import torch

from qkv.checkpoints.families.config_reader import ConfigReader, Key, read_keys
from qkv.checkpoints.families.encoder_heads import BODY, HeadKeys, Heads
from qkv.checkpoints.families.family import Family, layers_of, renamed, say, stack, sublayer, with_widths
from qkv.checkpoints.families.vision import sides
from qkv.checkpoints.maps import Flatten, KeyMap, Operation, Rule, ShapeError, Tensors, fuse_glu, fuse_qkv
from qkv.errors import ConfigError, FileError
from qkv.masks import Full
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.embedders import PatchEmbedderConfig
from qkv.nn.ffn import FFNConfig, GLUConfig
from qkv.nn.heads import TransformConfig
from qkv.nn.norms import LayerNormConfig
from qkv.nn.positions import CentredRoPEConfig

_KEYS: Final = (
    Key("hidden_size", "model.d_model", int, 384),
    Key("num_hidden_layers", "model.n_layers", int, 12),
    Key("num_channels", "embed.channels", int, 3),
    Key("num_attention_heads", "attention.n_heads", int, 6),
    Key("attention_dropout", "attention.weight_dropout", float, 0.0),
    Key("proj_bias", "attention.out_bias", bool, True),
    Key("rope_theta", "rope.theta", float, 100.0),
    Key("intermediate_size", "ffn.d_ff", int, 1536),
    Key("hidden_act", "ffn.activation", str, "gelu"),
    Key("mlp_bias", "ffn.bias", bool, True),
    Key("layer_norm_eps", "norm.eps", float, 1e-5),
    Key("layerscale_value", "block.layer_scale", float, 1.0),
    Key("drop_path_rate", "block.drop_path", float, 0.0),
)
_BIASES: Final = {"q": ("query_bias", True), "k": ("key_bias", False), "v": ("value_bias", True)}
_HEADS: Final = Heads("DINOv3ViT", {BODY: HeadKeys()}, dropout=None)
_HARMLESS: Final = (
    "apply_layernorm", "image_size", "out_features", "out_indices", "reshape_hidden_states", "stage_names",
    # how coordinates vary in training
    "pos_embed_jitter", "pos_embed_rescale", "pos_embed_shift",
)  # fmt: skip


def _read(source: ConfigReader) -> TransformerConfig:
    made = read_keys(source, _KEYS, {})
    norm, model = LayerNormConfig(**made["norm"]), made["model"]
    patch, other = sides(source, "patch_size", 16)
    if patch != other:
        raise FileError(f"{source.source}: patches of {patch} x {other} pixels; qkv reads square ones")
    bias = _read_bias(source, model["n_layers"])
    attention = AttentionConfig(mask=Full(), bias=bias, position=CentredRoPEConfig(**made["rope"]), **made["attention"])
    ffn = (GLUConfig if source.take("use_gated_mlp", bool, False) else FFNConfig)(**made["ffn"])
    block = PreNormConfig(norm=norm, sublayers=(attention, ffn), **made["block"])
    prefix = 1 + source.take("num_register_tokens", int, 0)
    head = _HEADS.read(source, masked=TransformConfig(), pooled=TransformConfig())
    source.finish(*_HARMLESS)
    return TransformerConfig(
        d_model=model["d_model"],
        embed=PatchEmbedderConfig(patch=patch, prefix=prefix, **made["embed"]),
        blocks=stack([block] * model["n_layers"]),
        final_norm=norm,
        head=head,
    )


def _read_bias(source: ConfigReader, n_layers: int) -> bool:
    """Whether queries, keys or values have a bias; it is 0 for those that have none.

    Raises:
        FileError: The weights, where they are known, say something else.
    """
    said = {name: source.take(key, bool, default) for name, (key, default) in _BIASES.items()}
    for name, there in said.items():
        n = sum(key.endswith(f".{name}_proj.bias") for key in source.tensors)
        if source.tensors and n != there * n_layers:
            key = _BIASES[name][0]
            raise FileError(
                f"{source.source}: {key!r} is {there}, and {n} of {n_layers} layers have such a bias; use the config "
                "that belongs to these weights"
            )
    return any(said.values())


def _draft(config: TransformerConfig) -> dict[str, Any]:
    embed, layers = config.embed, layers_of(config)
    first = with_widths(layers[0], config.d_model)
    if not isinstance(embed, PatchEmbedderConfig) or not embed.prefix:
        raise ConfigError("its embedder is none of patches with a class token")
    if config.head is not None:
        raise ConfigError(f"head is {config.head.tag()}, and this family has none")
    if len(first.sublayers) != 2:
        raise ConfigError(f"a block has {len(first.sublayers)} sublayers, and this family's have 2")
    attention, ffn = sublayer(first, 0, AttentionConfig), first.sublayers[1]
    if not isinstance(attention.position, CentredRoPEConfig) or not isinstance(ffn, FFNConfig | GLUConfig):
        raise ConfigError("its layers are not attention with CentredRoPE, and FFN or GLU")
    parts = {"model": config, "embed": embed, "attention": attention, "rope": attention.position, "ffn": ffn,
             "norm": first.norm, "block": first}  # fmt: skip
    return (
        {"model_type": "dinov3_vit", "patch_size": embed.patch, "num_register_tokens": embed.prefix - 1}
        | say(_KEYS, parts, {"model.n_layers": len(layers)})
        | {key: attention.bias for key, _ in _BIASES.values()}
        | {"use_gated_mlp": isinstance(ffn, GLUConfig)}
        | _HEADS.write(config.head)
    )


def _keys(config: TransformerConfig) -> KeyMap:
    embed, there = config.embed, "embeddings"
    assert isinstance(embed, PatchEmbedderConfig)
    trained = tuple(f"{there}.{name}" for name in ("cls_token", "register_tokens", "mask_token"))
    rules = [
        Rule(trained, "embed.prefix", Prefix(embed.prefix - 1)),
        Rule(
            f"{there}.patch_embeddings.weight",
            "embed.proj.weight",
            Flatten((embed.channels or 0, embed.patch, embed.patch)),
        ),
        Rule(f"{there}.patch_embeddings.bias", "embed.proj.bias"),
        *renamed("norm", "final_norm"),
    ]
    zeros: dict[str, str] = {}
    for i, block in enumerate(layers_of(config)):
        theirs, ours = f"layer.{i}", f"blocks.{i}"
        attention, ffn = sublayer(block, 0, AttentionConfig), block.sublayers[1]
        head_dim = attention.head_dim or config.d_model // attention.n_heads
        fuse = fuse_qkv(attention.n_heads, attention.n_heads, head_dim, head_dim)
        for part in ("weight", "bias") if attention.bias else ("weight",):
            three = tuple(f"{theirs}.attention.{x}_proj.{part}" for x in _BIASES)
            rules.append(Rule(three, f"{ours}.sublayers.attention.qkv_proj.{part}", fuse))
            zeros |= {key: key.replace("bias", "weight") for key in three if part == "bias"}
        out = ("weight", "bias") if attention.out_bias else ("weight",)
        rules += renamed(f"{theirs}.attention.o_proj", f"{ours}.sublayers.attention.o_proj", out)
        assert isinstance(ffn, FFNConfig | GLUConfig)
        linear, mlp, into = ("weight", "bias") if ffn.bias else ("weight",), f"{theirs}.mlp", f"{ours}.sublayers.ffn"
        if isinstance(ffn, GLUConfig):
            fuse = fuse_glu(ffn.width(config.d_model))
            for part in linear:
                both = (f"{mlp}.gate_proj.{part}", f"{mlp}.up_proj.{part}")
                rules.append(Rule(both, f"{into}.gate_up_proj.{part}", fuse))
        else:
            rules += renamed(f"{mlp}.up_proj", f"{into}.up_proj", linear)
        rules += renamed(f"{mlp}.down_proj", f"{into}.down_proj", linear)
        for number, name in enumerate(("attention", "ffn"), 1):
            rules += renamed(f"{theirs}.norm{number}", f"{ours}.norms.{name}")
            rules.append(Rule(f"{theirs}.layer_scale{number}.lambda1", f"{ours}.factors.{name}"))
    return KeyMap(rules, 0, zeros=zeros)


@final
@dataclass(frozen=True)
class Prefix(Operation):
    """A class token, `registers` more, and a mask token to those that a picture begins with.

    The last is dropped, since it is for training alone, and comes back as zeros.
    """

    registers: int

    def forward(self, theirs: Tensors) -> Tensors:
        needed = [(1, n, theirs[0].shape[-1]) for n in (1, self.registers, 1)]
        if (found := [tuple(x.shape) for x in theirs]) != needed:
            raise ShapeError(f"found {found}, needs {needed}")
        return (torch.cat(theirs[:2], 1)[0],)

    def inverse(self, ours: Tensors) -> Tensors:
        (prefix,) = ours
        first, registers = prefix.split([1, self.registers])
        return first[None], registers[None], torch.zeros_like(first)[None]


DINOV3: Final = Family(_read, _keys, prefix="", head="", table="", name="dinov3_vit", draft=_draft)
