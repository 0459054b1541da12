"""GPT-NeoX (Black et al. 2022), Pythia: both sublayers read the same stream, and a share of each head is rotated."""

from typing import Any

from qkv.checkpoints.families.config_reader import ConfigReader, Key, read_keys
from qkv.checkpoints.families.family import Family, context_of, parts_of, renamed, uniform, write_keys
from qkv.checkpoints.families.rope import RopeKeys, reach, read_rope, unstretched, write_rope
from qkv.checkpoints.maps import KeyMap, Rule
from qkv.models.transformer import TransformerConfig
from qkv.nn.blocks import ParallelPreNormConfig, PreNormConfig
from qkv.nn.ffn import FFNConfig

_ROPE = RopeKeys(
    theta="rotary_emb_base", fraction="rotary_pct", share=0.25, aliases=("rope_theta", "partial_rotary_factor")
)
_KEYS = (
    Key("hidden_size", "model.d_model", int, 6144),
    Key("num_hidden_layers", "model.n_layers", int, 44),
    Key("max_position_embeddings", "model.context", int, 2048),
    Key("num_attention_heads", "attention.n_heads", int, 64),
    Key("attention_bias", "attention.bias", bool, True),
    Key("attention_dropout", "attention.weight_dropout", float, 0.0),
    Key("hidden_dropout", "attention.dropout", float, 0.0),
    Key("intermediate_size", "ffn.d_ff", int, 24_576),
    Key("hidden_act", "ffn.activation", str, "gelu"),
    Key("layer_norm_eps", "norm.eps", float, 1e-5),
    Key("vocab_size", "embed.vocab_size", int, 50_432),
    Key("tie_word_embeddings", "head.tied", bool, False),
)


def _read(source: ConfigReader) -> TransformerConfig:
    made = read_keys(source, _KEYS, {})
    made["embed"]["dropout"] = made["attention"]["dropout"]
    made["attention"]["position"] = read_rope(source, made["model"]["context"], _ROPE)
    made["model"]["context"] = reach(made["model"]["context"], made["attention"]["position"])
    kind = ParallelPreNormConfig if source.take("use_parallel_residual", bool, True) else PreNormConfig
    source.finish("classifier_dropout", "is_decoder")
    return uniform(made, kind)


def _draft(config: TransformerConfig) -> dict[str, Any]:
    _, layers, attention, _ = parts_of(config)
    names = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"],
             "use_parallel_residual": isinstance(layers[0], ParallelPreNormConfig)}  # fmt: skip
    rope, context = attention.position, context_of(config)
    names |= write_keys(config, _KEYS, FFNConfig) | {"max_position_embeddings": unstretched(context, rope)}
    return names | write_rope(rope, context, _ROPE)


def _keys(config: TransformerConfig) -> KeyMap:
    """q, k and v lie head by head there, too."""
    _, layers, attention, head = parts_of(config)
    ours, theirs, biases = "blocks.{}", "gpt_neox.layers.{}", ("weight", "bias")
    linear = biases if attention.bias else ("weight",)
    rules = [Rule("gpt_neox.embed_in.weight", "embed.weight"), *renamed("gpt_neox.final_layer_norm", "final_norm")]
    for their, our, parts in (
        ("input_layernorm", "norms.attention", biases),
        ("post_attention_layernorm", "norms.ffn", biases),
        ("attention.query_key_value", "sublayers.attention.qkv_proj", linear),
        ("attention.dense", "sublayers.attention.o_proj", linear),
        ("mlp.dense_h_to_4h", "sublayers.ffn.up_proj", biases),
        ("mlp.dense_4h_to_h", "sublayers.ffn.down_proj", biases),
    ):
        rules += renamed(f"{theirs}.{their}", f"{ours}.{our}", parts)
    if not head.tied:
        rules.append(Rule("embed_out.weight", "head.weight"))
    buffers = (f"{theirs}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq"))
    return KeyMap(rules, len(layers), ignore=tuple(buffers))


GPT_NEOX = Family(
    _read, _keys, prefix="gpt_neox.", head="embed_out.weight", table="gpt_neox.embed_in.weight", name="gpt_neox",
    draft=_draft,
)  # fmt: skip
