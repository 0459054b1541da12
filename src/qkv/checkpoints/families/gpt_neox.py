"""GPT-NeoX (Black et al. 2022), Pythia: both sublayers read the same stream, and a share of each head is rotated."""

from typing import Any

from qkv.checkpoints.families.family import (
    ConfigReader,
    Family,
    activation_name,
    context_of,
    parts_of,
    renamed,
    sublayer,
    uniform,
)
from qkv.checkpoints.families.rope import RopeKeys, read_rope, write_rope
from qkv.checkpoints.maps import KeyMap, Rule
from qkv.masks import Causal
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import ParallelPreNormConfig, PreNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.norms import LayerNormConfig

_ROPE = RopeKeys(
    theta="rotary_emb_base", fraction="rotary_pct", share=0.25, aliases=("rope_theta", "partial_rotary_factor")
)


def read(source: ConfigReader) -> TransformerConfig:
    """The config of a GPT-NeoX model.

    Raises:
        FileError: The file asks for something that qkv does not implement, or knows.
    """
    d_model = source.take_positive("hidden_size", 6144)
    context = source.take_positive("max_position_embeddings", 2048)
    norm = LayerNormConfig(eps=source.take("layer_norm_eps", float, 1e-5))
    dropout = source.take("hidden_dropout", float, 0.0)
    attention = AttentionConfig(
        n_heads=source.take_positive("num_attention_heads", 64),
        mask=Causal(),
        bias=source.take("attention_bias", bool, True),
        position=read_rope(source, context, _ROPE),
        dropout=dropout,
        weight_dropout=source.take("attention_dropout", float, 0.0),
    )
    ffn = FFNConfig(
        d_ff=source.take_positive("intermediate_size", 24_576),
        activation=source.activation("hidden_act", "gelu"),
        bias=True,
        dropout=dropout,
    )
    kind = ParallelPreNormConfig if source.take("use_parallel_residual", bool, True) else PreNormConfig
    config = uniform(
        d_model,
        TokenEmbedderConfig(vocab_size=source.take_positive("vocab_size", 50_432), dropout=dropout),
        kind(norm=norm, sublayers=(attention, ffn)),
        source.take_layers("num_hidden_layers", 44),
        tied=source.take("tie_word_embeddings", bool, False),
        context=context,
    )
    source.finish("classifier_dropout", "is_decoder")
    return config


def draft(config: TransformerConfig) -> dict[str, Any]:
    """What `config.json` would say of a model."""
    embed, layers, attention, head = parts_of(config)
    ffn = sublayer(layers[0], 1, FFNConfig)
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": embed.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": ffn.d_ff or 4 * config.d_model,
        "num_hidden_layers": len(layers),
        "num_attention_heads": attention.n_heads,
        "hidden_act": activation_name(ffn.activation, "gelu_new"),
        "max_position_embeddings": context_of(config),
        "layer_norm_eps": layers[0].norm.eps,
        "tie_word_embeddings": head.tied,
        "use_parallel_residual": isinstance(layers[0], ParallelPreNormConfig),
        "attention_bias": attention.bias,
        "attention_dropout": attention.weight_dropout,
        "hidden_dropout": attention.dropout,
    } | write_rope(attention.position, context_of(config), _ROPE)


def keys(config: TransformerConfig) -> KeyMap:
    """The map between Hugging Face's keys and ours: q, k and v lie head by head there, too."""
    _, layers, attention, head = parts_of(config)
    ours, theirs, biases = "blocks.{}", "gpt_neox.layers.{}", ("weight", "bias")
    linear = biases if attention.bias else ("weight",)
    rules = [Rule("gpt_neox.embed_in.weight", "embed.weight")]
    for their, our, parts in (
        ("input_layernorm", "norms.attention", biases),
        ("post_attention_layernorm", "norms.ffn", biases),
        ("attention.query_key_value", "sublayers.attention.qkv_proj", linear),
        ("attention.dense", "sublayers.attention.o_proj", linear),
        ("mlp.dense_h_to_4h", "sublayers.ffn.up_proj", biases),
        ("mlp.dense_4h_to_h", "sublayers.ffn.down_proj", biases),
    ):
        rules += renamed(f"{theirs}.{their}", f"{ours}.{our}", parts)
    rules += renamed("gpt_neox.final_layer_norm", "final_norm")
    if not head.tied:
        rules.append(Rule("embed_out.weight", "head.weight"))
    buffers = (f"{theirs}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq"))
    return KeyMap(rules, len(layers), ignore=tuple(buffers))


GPT_NEOX = Family(
    read,
    keys,
    prefix="gpt_neox.",
    head="embed_out.weight",
    table="gpt_neox.embed_in.weight",
    name="gpt_neox",
    draft=draft,
)
