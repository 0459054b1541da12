"""Llama and its descendants: RMSNorm, rotary attention and a GLU. What tells them apart is a table, `Decoder`."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, final

from qkv.checkpoints.families.config_reader import ConfigReader, Key, read_keys
from qkv.checkpoints.families.family import Family, context_of, parts_of, renamed, stack, sublayer, write_keys
from qkv.checkpoints.families.rope import PLAIN, RopeKeys, reach, read_parameters, read_rope, unstretched, write_rope
from qkv.checkpoints.maps import KeyMap, Rule, Split, fuse_glu, fuse_qkv
from qkv.errors import ConfigError, FileError
from qkv.masks import And, Causal, Window
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import BlockConfig, PreNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import GLUConfig
from qkv.nn.heads import LMHeadConfig
from qkv.nn.norms import RMSNormConfig
from qkv.nn.positions import AttentionPositionConfig, RoPEConfig

FULL, SLIDING = "full_attention", "sliding_attention"
"""Hugging Face's names of the two kinds of layers."""

_KEYS = (
    Key("vocab_size", "embed.vocab_size", int),
    Key("hidden_size", "model.d_model", int),
    Key("num_hidden_layers", "model.n_layers", int),
    Key("max_position_embeddings", "model.context", int),
    Key("num_attention_heads", "attention.n_heads", int),
    Key("num_key_value_heads", "attention.n_kv_heads", int, nullable=True),
    Key("head_dim", "attention.head_dim", int, nullable=True),
    Key("attention_dropout", "attention.weight_dropout", float, 0.0),
    Key("intermediate_size", "ffn.d_ff", int),
    Key("rms_norm_eps", "norm.eps", float),
    Key("tie_word_embeddings", "head.tied", bool, False),
)
"""Of every family."""

ATTENTION_BIAS = Key("attention_bias", "attention.bias", bool, False)
ACTIVATION = Key("hidden_act", "ffn.activation", str, "silu")
MLP_BIAS = Key("mlp_bias", "ffn.bias", bool, False)
SOFTCAPS = (
    Key("attn_logit_softcapping", "attention.softcap", float, nullable=True),
    Key("final_logit_softcapping", "head.softcap", float, nullable=True),
)
DROPOUTS = (Key("resid_pdrop", "attention.dropout", float, 0.0), Key("embd_pdrop", "embed.dropout", float, 0.0))

PRE_NORMS = {"input_layernorm": "norms.attention", "post_attention_layernorm": "norms.ffn"}
SANDWICH_NORMS = {
    "input_layernorm": "norms.attention",
    "post_attention_layernorm": "out_norms.attention",
    "pre_feedforward_layernorm": "norms.ffn",
    "post_feedforward_layernorm": "out_norms.ffn",
}


@final
@dataclass(frozen=True)
class Decoder:
    """How a family differs from its relatives.

    Attributes:
        name: Its `model_type`.
        architecture: The class that loads its checkpoints.
        defaults: What Hugging Face takes where a file leaves a key out and no width follows from others.
        keys: Keys that not all relatives have.
        activation: The key of the GLU's activation.
        settings: What is always so, by part and field.
        block: Where the norms stand.
        norms: Their names of a layer's norms, and ours.
        qk_norm: Whether queries and keys are normed.
        windows: Which layers have sliding windows: none; all, where 'sliding_window' is set; those from
            'max_window_layers' on; or all but each so many-th. 'layer_types' goes before the latter two.
        rope: The names of the parts of the rotary embedding.
        local_rope: Names of the parts of the rotary embedding of layers with windows; None: it is that of the others.
        query_scalar: Whether there is a key for the scale of the scores.
        fused: Whether q, k, v, and gate and up, are stored in one weight each: rows of all queries, keys, values.
        width: What `transformers` accepts as `hidden_size`: any; a multiple of the heads; or heads times head_dim.
        fixed: Keys with the one value that is implemented.
        harmless: Keys that change nothing.
    """

    name: str
    architecture: str
    defaults: Mapping[str, Any]
    keys: tuple[Key, ...] = ()
    activation: Key = ACTIVATION
    settings: Mapping[str, Any] = field(default_factory=dict)
    block: type[BlockConfig] = PreNormConfig
    norms: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    qk_norm: bool = False
    windows: Literal["none", "all", "late"] | int = "none"
    rope: RopeKeys = PLAIN
    local_rope: RopeKeys | None = None
    query_scalar: bool = False
    fused: bool = False
    width: Literal["any", "multiple", "exact"] = "any"
    fixed: Mapping[str, object] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()

    @property
    def all_keys(self) -> tuple[Key, ...]:
        """Those of all relatives, and its own."""
        return (*_KEYS, self.activation, *self.keys)

    def family(self) -> Family:
        """The family of this table."""
        return Family(
            read=functools.partial(_read, self),
            keys=functools.partial(_keys, self),
            prefix="model.",
            head="lm_head.weight",
            table="model.embed_tokens.weight",
            name=self.name,
            draft=functools.partial(_draft, self),
        )


# --- in -------------------------------------------------------------------------------------------------------------


def _read(spec: Decoder, source: ConfigReader) -> TransformerConfig:
    made = read_keys(source, spec.all_keys, spec.defaults)
    for name, value in spec.settings.items():
        part, _, last = name.partition(".")
        made[part][last] = value
    model, attention = made["model"], made["attention"]
    norm = RMSNormConfig(**made["norm"])
    attention["n_kv_heads"] = attention["n_kv_heads"] or attention["n_heads"]
    attention["head_dim"] = attention["head_dim"] or model["d_model"] // attention["n_heads"]
    if attention["head_dim"] < 1:
        raise FileError(f"{source.source}: has {attention['n_heads']} heads, more than its width; fix the file")
    if spec.qk_norm:
        attention["qk_norm"] = norm
    if spec.query_scalar:
        scalar = source.take_factor("query_pre_attn_scalar", 256.0)
        attention["scale"] = None if scalar == attention["head_dim"] else scalar**-0.5
    glu = GLUConfig(**made["ffn"], dropout=attention.get("dropout", 0.0))
    kinds, window = _read_windows(spec, source, model["n_layers"])
    ropes = _read_ropes(spec, source, model["context"])

    def block(kind: str) -> BlockConfig:
        mask = Causal() if kind == FULL or window is None else Causal() & Window(size=window)
        mixer = AttentionConfig(**attention, **{"mask": mask, "position": ropes[kind]})
        return spec.block(norm=norm, sublayers=(mixer, glu))

    blocks = {kind: block(kind) for kind in sorted(set(kinds))}
    for key, value in spec.fixed.items():
        source.require(key, value)
    source.finish(*spec.harmless)
    return TransformerConfig(
        d_model=model["d_model"],
        embed=TokenEmbedderConfig(**made["embed"]),
        blocks=stack([blocks[kind] for kind in kinds]),
        final_norm=norm,
        head=LMHeadConfig(**made["head"]),
        context=reach(model["context"], ropes[FULL], spec.rope),
    )


def _read_windows(spec: Decoder, source: ConfigReader, n: int) -> tuple[list[str], int | None]:
    """The kind of each layer, and the size of the windows."""
    if spec.windows == "none":
        return [FULL] * n, None
    size = source.optional("sliding_window", int, spec.defaults.get("sliding_window"))
    if spec.windows == "all":
        return [FULL if size is None else SLIDING] * n, size
    if spec.windows == "late":
        size = size if source.take("use_sliding_window", bool, False) else None
        late = source.take("max_window_layers", int, 28)
        kinds = [FULL if size is None or i < late else SLIDING for i in range(n)]
    else:
        default = source.optional_count("_sliding_window_pattern", spec.windows)
        every = source.take_positive("sliding_window_pattern", default)
        kinds = [SLIDING if (i + 1) % every else FULL for i in range(n)]
    kinds = source.optional("layer_types", list) or kinds
    if len(kinds) != n or not all(kind in (FULL, SLIDING) for kind in kinds):
        raise FileError(f"{source.source}: 'layer_types' must say {FULL!r} or {SLIDING!r} for each of {n} layers")
    if size is None and SLIDING in kinds:
        raise FileError(f"{source.source}: layers have windows and 'sliding_window' gives no size; fix the file")
    return kinds, size


def _read_ropes(spec: Decoder, source: ConfigReader, context: int) -> dict[str, RoPEConfig]:
    """The rotary embedding of each kind of layer."""
    if spec.local_rope is None:
        rope = read_rope(source, context, spec.rope)
        return {FULL: rope, SLIDING: rope}
    names = {FULL: spec.rope, SLIDING: spec.local_rope}
    if spec.rope.theta == spec.local_rope.theta:  # of which versions of `transformers` make different things
        source.require(spec.rope.theta, spec.rope.base)
    bases = {kind: source.take(name.theta, float, name.base) for kind, name in names.items()}
    newer = source.optional("rope_parameters", dict)
    if newer is None:
        full = dataclasses.replace(spec.rope, base=bases[FULL])
        return {FULL: read_rope(source, context, full), SLIDING: RoPEConfig(theta=bases[SLIDING])}
    outer, made = ConfigReader(newer, f"{source.source}, rope_parameters"), {}
    for kind, base in bases.items():
        inner = ConfigReader(outer.take(kind, dict, {}), f"{outer.source}.{kind}")
        made[kind] = read_parameters(inner, context, RopeKeys(base=base))
    outer.finish()
    return made


# --- out ------------------------------------------------------------------------------------------------------------


def _draft(spec: Decoder, config: TransformerConfig) -> dict[str, Any]:
    _, layers, attention, _ = parts_of(config)
    data: dict[str, Any] = {"model_type": spec.name, "architectures": [spec.architecture]}
    data |= write_keys(config, spec.all_keys, GLUConfig)
    _check_width(spec, config.d_model, attention.n_heads, data["head_dim"])
    if data["head_dim"] * attention.n_heads == config.d_model and "head_dim" not in spec.defaults:
        del data["head_dim"]  # it follows, and some loaders do not know the key
    if spec.query_scalar:
        data["query_pre_attn_scalar"] = data["head_dim"] if attention.scale is None else round(attention.scale**-2)
    full = next((block for block in layers if _window(block) is None), layers[0])
    position, context = sublayer(full, 0, AttentionConfig).position, context_of(config)
    data["max_position_embeddings"] = unstretched(context, position, spec.rope)
    return data | _draft_windows(spec, layers) | _draft_rope(spec, layers, position, context)


def _check_width(spec: Decoder, d_model: int, n_heads: int, head_dim: int) -> None:
    if spec.width == "multiple" and d_model % n_heads:
        raise ConfigError(f"d_model={d_model} is no multiple of n_heads={n_heads}, and there it must be one")
    if spec.width == "exact" and d_model != n_heads * head_dim:
        raise ConfigError(f"d_model={d_model} is not n_heads={n_heads} times head_dim={head_dim}, and there it must be")


def _draft_windows(spec: Decoder, layers: list[BlockConfig]) -> dict[str, Any]:
    if spec.windows == "none":
        return {}
    sizes = [_window(block) for block in layers]
    size = next((size for size in sizes if size is not None), None)
    if spec.windows == "all":
        return {"sliding_window": size}
    data = {"sliding_window": size, "layer_types": [FULL if size is None else SLIDING for size in sizes]}
    if spec.windows == "late":
        first = next((i for i, size in enumerate(sizes) if size is not None), len(sizes))
        return data | {"use_sliding_window": size is not None, "max_window_layers": first}
    if size is None:  # a mask for windows is made there even where no layer has one
        data["sliding_window"] = spec.defaults["sliding_window"]
    return data | {"sliding_window_pattern": spec.windows}


def _draft_rope(
    spec: Decoder, layers: list[BlockConfig], position: AttentionPositionConfig | None, context: int
) -> dict[str, Any]:
    """The rotary embedding of layers without windows and, where the family has one, of those with."""
    data = write_rope(position, context, spec.rope)
    if spec.local_rope is None:
        return data
    windowed = next((block for block in layers if _window(block) is not None), None)
    local = RoPEConfig(theta=spec.local_rope.base)
    if windowed is not None:
        local = sublayer(windowed, 0, AttentionConfig).position
    theirs = write_rope(local, context, spec.local_rope)
    bases = data[spec.rope.theta], theirs[spec.local_rope.theta]
    one_key = spec.rope.theta == spec.local_rope.theta
    if "rope_scaling" not in theirs and (not one_key or set(bases) == {spec.rope.base}):
        return theirs | data
    ropes = zip((FULL, SLIDING), bases, (data, theirs), strict=True)
    return {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": base} | made.get("rope_scaling", {}) for kind, base, made in ropes
    }}  # fmt: skip


def _window(block: BlockConfig) -> int | None:
    """The size of the sliding window of a layer."""
    mask = sublayer(block, 0, AttentionConfig).mask
    return mask.b.size if isinstance(mask, And) and isinstance(mask.b, Window) else None


# --- keys -----------------------------------------------------------------------------------------------------------


def _keys(spec: Decoder, config: TransformerConfig) -> KeyMap:
    _, layers, attention, head = parts_of(config)
    glu = sublayer(layers[0], 1, GLUConfig)
    head_dim = attention.head_dim or config.d_model // attention.n_heads
    n_kv_heads = attention.n_kv_heads or attention.n_heads
    rows = (attention.n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim)
    fuse = fuse_qkv(attention.n_heads, n_kv_heads, head_dim, head_dim)
    their, our = "model.layers.{}", "blocks.{}.sublayers"
    rules = [
        Rule("model.embed_tokens.weight", "embed.weight"),
        Rule("model.norm.weight", "final_norm.weight"),
        *(Rule(f"{their}.{name}.weight", f"blocks.{{}}.{place}.weight") for name, place in spec.norms.items()),
    ]
    if attention.qk_norm is not None:
        rules += [Rule(f"{their}.self_attn.{x}_norm.weight", f"{our}.attention.{x}_norm.weight") for x in "qk"]
    weight, both = ("weight",), ("weight", "bias")
    for part in both if attention.bias else weight:
        ours = f"{our}.attention.qkv_proj.{part}"
        if spec.fused:
            rules.append(Rule(f"{their}.self_attn.qkv_proj.{part}", ours, Split(rows), fuse))
        else:
            rules.append(Rule(tuple(f"{their}.self_attn.{x}_proj.{part}" for x in "qkv"), ours, fuse))
    out_bias = attention.bias if attention.out_bias is None else attention.out_bias
    rules += renamed(f"{their}.self_attn.o_proj", f"{our}.attention.o_proj", both if out_bias else weight)
    rules += renamed(f"{their}.mlp.down_proj", f"{our}.ffn.down_proj", both if glu.bias else weight)
    d_ff = glu.width(config.d_model)
    for part in both if glu.bias else weight:
        ours = f"{our}.ffn.gate_up_proj.{part}"
        if spec.fused:  # the whole gate, then all values
            rules.append(Rule(f"{their}.mlp.gate_up_proj.{part}", ours, Split((d_ff, d_ff)), fuse_glu(d_ff)))
        else:
            rules.append(Rule(tuple(f"{their}.mlp.{x}_proj.{part}" for x in ("gate", "up")), ours, fuse_glu(d_ff)))
    if not head.tied:
        rules.append(Rule("lm_head.weight", "head.weight"))
    return KeyMap(rules, len(layers), ignore=(f"{their}.self_attn.rotary_emb.inv_freq",))
