"""GPT-2 in the layout of Hugging Face: fused q|k|v, weights stored inputs by outputs, tied head."""

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
from qkv.checkpoints.maps import KeyMap, Rule, Split, Transpose, fuse_qkv
from qkv.masks import Causal
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.norms import LayerNormConfig
from qkv.nn.positions import LearnedPositionsConfig


def read(source: ConfigReader) -> TransformerConfig:
    """The config of a GPT-2 model.

    Raises:
        FileError: The file asks for something that qkv does not implement, or knows.
    """
    d_model = source.take_positive("n_embd", 768)
    context = source.take_positive("n_positions", 1024)
    norm = LayerNormConfig(eps=source.take("layer_norm_epsilon", float, 1e-5))
    residual_dropout = source.take("resid_pdrop", float, 0.1)
    attention = AttentionConfig(
        n_heads=source.take_positive("n_head", 12),
        mask=Causal(),
        bias=True,
        dropout=residual_dropout,
        weight_dropout=source.take("attn_pdrop", float, 0.1),
        scale=None if source.take("scale_attn_weights", bool, True) else 1.0,
    )
    ffn = FFNConfig(
        d_ff=source.optional("n_inner", int) or 4 * d_model,
        activation=source.activation("activation_function", "gelu_new"),
        bias=True,
        dropout=residual_dropout,
    )
    config = uniform(
        d_model,
        TokenEmbedderConfig(
            vocab_size=source.take_positive("vocab_size", 50_257),
            position=LearnedPositionsConfig(length=context),
            dropout=source.take("embd_pdrop", float, 0.1),
        ),
        PreNormConfig(norm=norm, sublayers=(attention, ffn)),
        source.take_layers("n_layer", 12),
        tied=source.take("tie_word_embeddings", bool, True),
        context=context,
    )
    source.require("scale_attn_by_inverse_layer_idx", False)
    source.require("add_cross_attention", False)
    source.require("n_ctx", context)
    summary = ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")  # of a classification head
    source.finish("reorder_and_upcast_attn", "gradient_checkpointing", *(f"summary_{name}" for name in summary))
    return config


def draft(config: TransformerConfig) -> dict[str, Any]:
    """What `config.json` would say of a model."""
    embed, layers, attention, head = parts_of(config)
    ffn = sublayer(layers[0], 1, FFNConfig)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": embed.vocab_size,
        "n_positions": context_of(config),
        "n_embd": config.d_model,
        "n_layer": len(layers),
        "n_head": attention.n_heads,
        "n_inner": ffn.d_ff or 4 * config.d_model,
        "activation_function": activation_name(ffn.activation, "gelu_new"),
        "layer_norm_epsilon": layers[0].norm.eps,
        "scale_attn_weights": attention.scale != 1.0,
        "tie_word_embeddings": head.tied,
        "resid_pdrop": attention.dropout,
        "embd_pdrop": embed.dropout,
        "attn_pdrop": attention.weight_dropout,
    }


def keys(config: TransformerConfig) -> KeyMap:
    """The map between Hugging Face's keys and ours."""
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
    for their, our in (
        ("attn.c_proj", "attention.o_proj"),
        ("mlp.c_fc", "ffn.up_proj"),
        ("mlp.c_proj", "ffn.down_proj"),
    ):
        rules.append(Rule(f"{theirs}.{their}.weight", f"{ours}.{our}.weight", Transpose()))
        rules += renamed(f"{theirs}.{their}", f"{ours}.{our}", ("bias",))
    if not head.tied:
        rules.append(Rule("lm_head.weight", "head.weight"))
    masks = (f"{theirs}.attn.bias", f"{theirs}.attn.masked_bias")  # buffers in older files
    return KeyMap(rules, len(layers), ignore=masks)


GPT2 = Family(
    read,
    keys,
    prefix="transformer.",
    head="lm_head.weight",
    table="transformer.wte.weight",
    name="gpt2",
    draft=draft,
)
