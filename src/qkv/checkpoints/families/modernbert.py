"""ModernBERT (Warner et al. 2024): pre-norm, rotary, gated, with windows in all layers but each third."""

from typing import Any, Final

from qkv.checkpoints.families.config_reader import ConfigReader, Key, read_keys
from qkv.checkpoints.families.decoder import FULL, SLIDING
from qkv.checkpoints.families.encoder_heads import BODY, MASKED, TEXTS, TOKENS, HeadKeys, Heads, norm_parts
from qkv.checkpoints.families.family import Family, layers_of, renamed, say, stack, sublayer, with_widths
from qkv.checkpoints.families.rope import RopeKeys, read_parameters
from qkv.checkpoints.maps import KeyMap, Rule, Split, fuse_glu, fuse_qkv
from qkv.errors import ConfigError, FileError
from qkv.masks import Full, Window
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import GLUConfig
from qkv.nn.heads import ClassHeadConfig, LMHeadConfig, TransformConfig
from qkv.nn.norms import LayerNormConfig, NoNormConfig
from qkv.nn.pooling import FirstTokenConfig, MeanPoolConfig
from qkv.nn.positions import RoPEConfig

_KEYS: Final = (
    Key("vocab_size", "embed.vocab_size", int, 50_368),
    Key("embedding_dropout", "embed.dropout", float, 0.0),
    Key("hidden_size", "model.d_model", int, 768),
    Key("num_hidden_layers", "model.n_layers", int, 22),
    Key("max_position_embeddings", "model.context", int, 8192),
    Key("num_attention_heads", "attention.n_heads", int, 12),
    Key("attention_bias", "attention.bias", bool, False),
    Key("attention_dropout", "attention.weight_dropout", float, 0.0),
    Key("intermediate_size", "ffn.d_ff", int, 1152),
    Key("hidden_activation", "ffn.activation", str, "gelu"),
    Key("mlp_bias", "ffn.bias", bool, False),
    Key("norm_eps", "norm.eps", float, 1e-5),
    Key("norm_bias", "norm.bias", bool, False),
)
_THETAS: Final = {FULL: ("global_rope_theta", 160_000.0), SLIDING: ("local_rope_theta", 10_000.0)}
_HEAD: Final = ("head.dense", "head.norm")
_HEADS: Final = Heads(
    "ModernBert",
    {
        BODY: HeadKeys(),
        MASKED: HeadKeys(*_HEAD, "decoder"),
        TEXTS: HeadKeys(*_HEAD, "classifier"),
        TOKENS: HeadKeys(*_HEAD, "classifier"),
    },
)
_HARMLESS: Final = (
    "deterministic_flash_attn", "global_attn_every_n_layers", "initializer_cutoff_factor", "mlp_dropout",
    "reference_compile", "repad_logits_with_grad", "sparse_pred_ignore_index", "sparse_prediction",
)  # fmt: skip


def _read(source: ConfigReader) -> TransformerConfig:
    made = read_keys(source, _KEYS, {})
    model, norm = made["model"], LayerNormConfig(**made["norm"])
    every = source.take_positive("global_attn_every_n_layers", 3)
    kinds = source.optional("layer_types", list) or [SLIDING if i % every else FULL for i in range(model["n_layers"])]
    if len(kinds) != model["n_layers"] or not all(kind in (FULL, SLIDING) for kind in kinds):
        raise FileError(f"{source.source}: 'layer_types' must say {FULL!r} or {SLIDING!r} for each layer; fix the file")
    reach = source.take_positive("local_attention", 128) // 2  # on each side
    masks = {FULL: Full(), SLIDING: Window(size=reach + 1)}
    glu, ropes = GLUConfig(**made["ffn"]), _read_ropes(source, model["context"])
    attentions = {
        kind: AttentionConfig(mask=masks[kind], position=ropes[kind], **made["attention"]) for kind in (FULL, SLIDING)
    }
    layers = [PreNormConfig(norm=norm, sublayers=(attentions[kind], glu)) for kind in kinds]
    act, pool = source.take("classifier_activation", str, "gelu"), source.take("classifier_pooling", str, "cls")
    if act != "gelu" or pool not in ("cls", "mean"):
        raise FileError(f"{source.source}: classifiers by {act!r} and {pool!r}; qkv knows 'gelu', and 'cls' or 'mean'")
    transform = TransformConfig(norm=norm, bias=source.take("classifier_bias", bool, False))
    head = _HEADS.read(
        source,
        masked=transform,
        pooled=transform,
        pool=MeanPoolConfig() if pool == "mean" else FirstTokenConfig(),
        bias=source.take("decoder_bias", bool, True),
    )
    source.finish(*_HARMLESS)
    return TransformerConfig(
        d_model=model["d_model"],
        embed=TokenEmbedderConfig(norm=norm, **made["embed"]),
        blocks=_blocks(layers),
        final_norm=norm,
        head=head,
        context=model["context"],
    )


def _read_ropes(source: ConfigReader, context: int) -> dict[str, RoPEConfig]:
    newer = source.optional("rope_parameters", dict) or {}
    outer, made = ConfigReader(newer, f"{source.source}, rope_parameters"), dict[str, RoPEConfig]()
    for kind, (key, base) in _THETAS.items():
        inner = ConfigReader(outer.take(kind, dict, {}), f"{outer.source}.{kind}")
        made[kind] = read_parameters(inner, context, RopeKeys(base=source.take(key, float, base)))
    outer.finish()
    return made


def _blocks(layers: list[PreNormConfig]) -> tuple[Any, ...]:
    """The first layer's attention has no norm, since embeddings have one: it stands in a block of its own."""
    attention, glu = layers[0].sublayers
    first = PreNormConfig(norm=NoNormConfig(), sublayers=(attention,))
    second = PreNormConfig(norm=layers[0].norm, sublayers=(glu,))
    rest = stack(layers[1:])
    return (first, second, *(rest if isinstance(rest, tuple) else (rest,)))


def _layers(config: TransformerConfig) -> list[tuple[int, AttentionConfig, int, GLUConfig]]:
    """Of each of their layers: the block and config of its attention, and those of its GLU."""
    blocks = layers_of(config)
    if len(blocks) < 2 or [len(block.sublayers) for block in blocks] != [1, 1] + [2] * (len(blocks) - 2):
        raise ConfigError("its first layer is not an attention alone, then a GLU alone")
    first = (0, sublayer(blocks[0], 0, AttentionConfig), 1, sublayer(blocks[1], 0, GLUConfig))
    rest = enumerate(blocks[2:], 2)
    return [first, *((i, sublayer(block, 0, AttentionConfig), i, sublayer(block, 1, GLUConfig)) for i, block in rest)]


def _draft(config: TransformerConfig) -> dict[str, Any]:
    layers = _layers(config)
    kinds = [SLIDING if isinstance(attention.mask, Window) else FULL for _, attention, _, _ in layers]
    of_kind = dict(zip(reversed(kinds), (attention for _, attention, _, _ in reversed(layers)), strict=True))
    blocks = [with_widths(block, config.d_model) for block in layers_of(config)[:2]]
    parts = {"model": config, "embed": config.embed, "attention": blocks[0].sublayers[0],
             "ffn": blocks[1].sublayers[0], "norm": blocks[1].norm}  # fmt: skip
    data: dict[str, Any] = {"model_type": "modernbert", "layer_types": kinds}
    data |= say(_KEYS, parts, {"model.n_layers": len(layers), "model.context": config.limit})
    for kind, (key, _) in _THETAS.items():
        if kind in of_kind and isinstance(position := of_kind[kind].position, RoPEConfig):
            data[key] = position.theta
    if SLIDING in of_kind and isinstance(mask := of_kind[SLIDING].mask, Window):
        data["local_attention"] = 2 * (mask.size - 1)
    head = config.head
    if isinstance(head, LMHeadConfig):
        data["decoder_bias"] = head.bias
    if isinstance(head, LMHeadConfig | ClassHeadConfig) and head.transform is not None:
        data["classifier_bias"] = head.transform.bias
    if isinstance(head, ClassHeadConfig):
        data["classifier_pooling"] = "mean" if isinstance(head.pool, MeanPoolConfig) else "cls"
    return data | _HEADS.write(head)


def _keys(config: TransformerConfig) -> KeyMap:
    norm = norm_parts(config.final_norm)
    rules = [
        Rule("model.embeddings.tok_embeddings.weight", "embed.weight"),
        *renamed("model.embeddings.norm", "embed.norm", norm),
        *renamed("model.final_norm", "final_norm", norm),
        *_HEADS.rules(config.head),
    ]
    for layer, (at, attention, of_glu, glu) in enumerate(_layers(config)):
        theirs, ours, n_heads = f"model.layers.{layer}", f"blocks.{at}.sublayers.attention", attention.n_heads
        head_dim, d_ff = attention.head_dim or config.d_model // n_heads, glu.width(config.d_model)
        thirds, fuse = Split((n_heads * head_dim,) * 3), fuse_qkv(n_heads, n_heads, head_dim, head_dim)
        linear = ("weight", "bias") if attention.bias else ("weight",)
        rules += [Rule(f"{theirs}.attn.Wqkv.{part}", f"{ours}.qkv_proj.{part}", thirds, fuse) for part in linear]
        rules += renamed(f"{theirs}.attn.Wo", f"{ours}.o_proj", linear)
        linear, ours = ("weight", "bias") if glu.bias else ("weight",), f"blocks.{of_glu}.sublayers.ffn"
        halves, fuse = Split((d_ff, d_ff)), fuse_glu(d_ff)
        rules += [Rule(f"{theirs}.mlp.Wi.{part}", f"{ours}.gate_up_proj.{part}", halves, fuse) for part in linear]
        rules += renamed(f"{theirs}.mlp.Wo", f"{ours}.down_proj", linear)
        rules += renamed(f"{theirs}.mlp_norm", f"blocks.{of_glu}.norms.ffn", norm)
        if layer:
            rules += renamed(f"{theirs}.attn_norm", f"blocks.{at}.norms.attention", norm)
    return KeyMap(rules, 0)


MODERNBERT: Final = Family(
    _read, _keys, prefix="model.", head="decoder.weight", table="model.embeddings.tok_embeddings.weight",
    name="modernbert", draft=_draft,
)  # fmt: skip
