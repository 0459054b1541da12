"""GPT-2 in the layout of Hugging Face: fused q|k|v, weights stored inputs by outputs, tied head."""

from typing import Any

from qkv.checkpoints.families.config_reader import ConfigReader, Key, read_keys
from qkv.checkpoints.families.family import Family, parts_of, renamed, uniform, write_keys
from qkv.checkpoints.maps import KeyMap, Rule, Split, Transpose, fuse_qkv
from qkv.models.transformer import TransformerConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.positions import LearnedPositionsConfig

_KEYS = (
    Key("n_embd", "model.d_model", int, 768),
    Key("n_layer", "model.n_layers", int, 12),
    Key("n_positions", "model.context", int, 1024),
    Key("n_head", "attention.n_heads", int, 12),
    Key("attn_pdrop", "attention.weight_dropout", float, 0.1),
    Key("resid_pdrop", "attention.dropout", float, 0.1),
    Key("n_inner", "ffn.d_ff", int, nullable=True),
    Key("activation_function", "ffn.activation", str, "gelu_new"),
    Key("layer_norm_epsilon", "norm.eps", float, 1e-5),
    Key("vocab_size", "embed.vocab_size", int, 50_257),
    Key("embd_pdrop", "embed.dropout", float, 0.1),
    Key("tie_word_embeddings", "head.tied", bool, True),
)


def _read(source: ConfigReader) -> TransformerConfig:
    made = read_keys(source, _KEYS, {})
    context = made["model"]["context"]
    made["attention"] |= {"bias": True, "scale": None if source.take("scale_attn_weights", bool, True) else 1.0}
    made["embed"]["position"] = LearnedPositionsConfig(length=context)
    made["ffn"]["d_ff"] = made["ffn"]["d_ff"] or 4 * made["model"]["d_model"]
    for key, value in (("scale_attn_by_inverse_layer_idx", False), ("add_cross_attention", False), ("n_ctx", context)):
        source.require(key, value)
    summary = ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")  # of a classification head
    source.finish("reorder_and_upcast_attn", *(f"summary_{name}" for name in summary))
    return uniform(made, PreNormConfig)


def _draft(config: TransformerConfig) -> dict[str, Any]:
    scaled = parts_of(config).attention.scale != 1.0
    names = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "scale_attn_weights": scaled}
    return names | write_keys(config, _KEYS, FFNConfig)


def _keys(config: TransformerConfig) -> KeyMap:
    _, layers, attention, head = parts_of(config)
    n_heads, width = attention.n_heads, config.d_model
    thirds, fuse = Split((width,) * 3), fuse_qkv(n_heads, n_heads, width // n_heads, width // n_heads)
    ours, theirs = "blocks.{}.sublayers", "transformer.h.{}"
    rules = [
        Rule("transformer.wte.weight", "embed.weight"),
        Rule("transformer.wpe.weight", "embed.position.weight"),
        *renamed("transformer.ln_f", "final_norm"),
        *renamed(f"{theirs}.ln_1", "blocks.{}.norms.attention"),
        *renamed(f"{theirs}.ln_2", "blocks.{}.norms.ffn"),
        Rule(f"{theirs}.attn.c_attn.weight", f"{ours}.attention.qkv_proj.weight", Transpose(), thirds, fuse),
        Rule(f"{theirs}.attn.c_attn.bias", f"{ours}.attention.qkv_proj.bias", thirds, fuse),
    ]
    linear = {"attn.c_proj": "attention.o_proj", "mlp.c_fc": "ffn.up_proj", "mlp.c_proj": "ffn.down_proj"}
    for their, our in linear.items():
        rules.append(Rule(f"{theirs}.{their}.weight", f"{ours}.{our}.weight", Transpose()))
        rules += renamed(f"{theirs}.{their}", f"{ours}.{our}", ("bias",))
    if not head.tied:
        rules.append(Rule("lm_head.weight", "head.weight"))
    masks = (f"{theirs}.attn.bias", f"{theirs}.attn.masked_bias")  # buffers in older files
    return KeyMap(rules, len(layers), ignore=masks)


GPT2 = Family(
    _read,
    _keys,
    prefix="transformer.",
    head="lm_head.weight",
    table="transformer.wte.weight",
    name="gpt2",
    draft=_draft,
)
