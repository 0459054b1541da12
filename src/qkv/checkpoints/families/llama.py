"""Llama in the layout of Hugging Face: separate q, k, v, gate and up; rotary pairs half a head apart."""

import math
from typing import Any

from qkv.checkpoints.families.family import ConfigReader, Family, attention_of, one_block
from qkv.checkpoints.maps import Fuse, FuseQKV, KeyMap, Rule
from qkv.errors import FileError
from qkv.masks import Causal
from qkv.models.transformer import Repeat, TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import PreNormConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.ffn import GLUConfig
from qkv.nn.heads import LMHeadConfig
from qkv.nn.norms import RMSNormConfig
from qkv.nn.positions import (
    DynamicNTKScalingConfig,
    LinearScalingConfig,
    Llama3ScalingConfig,
    RoPEConfig,
    RoPEScalingConfig,
    YaRNScalingConfig,
)


def read(source: ConfigReader) -> TransformerConfig:
    """The config of a Llama model.

    Raises:
        FileError: The file asks for something that qkv does not implement, or knows.
    """
    d_model, n_heads = source.take_positive("hidden_size"), source.take_positive("num_attention_heads")
    context = source.take_positive("max_position_embeddings", 2048)
    norm = RMSNormConfig(eps=source.take("rms_norm_eps", float, 1e-6))
    bias = source.take("attention_bias", bool, False)
    attention = AttentionConfig(
        n_heads=n_heads,
        n_kv_heads=source.take_positive("num_key_value_heads", n_heads),
        head_dim=source.take_positive("head_dim", d_model // n_heads),
        mask=Causal(),
        bias=bias,
        position=read_rope(source, context),
        weight_dropout=source.take("attention_dropout", float, 0.0),
    )
    glu = GLUConfig(
        d_ff=source.take_positive("intermediate_size"),
        activation=source.activation("hidden_act", "silu"),
        bias=source.take("mlp_bias", bool, False),
    )
    config = TransformerConfig(
        d_model=d_model,
        embed=TokenEmbedderConfig(vocab_size=source.take_positive("vocab_size", 32_000)),
        blocks=Repeat(
            n=source.take_positive("num_hidden_layers"), pattern=PreNormConfig(norm=norm, sublayers=(attention, glu))
        ),
        final_norm=norm,
        head=LMHeadConfig(tied=source.take("tie_word_embeddings", bool, False)),
        context=context,
    )
    source.require("rope_interleaved", False)
    source.finish("is_llama_config")
    return config


def read_rope(source: ConfigReader, context: int) -> RoPEConfig:
    """Rotary embedding, from the newer layout (`rope_parameters`) or the older one (`rope_theta`, `rope_scaling`).

    Raises:
        FileError: An unknown kind of scaling, or an unknown key in it.
    """
    newer: dict[str, Any] = source.optional("rope_parameters", dict) or {}
    older: dict[str, Any] = source.optional("rope_scaling", dict) or {}
    theta = source.optional("rope_theta", float)
    if newer and older:
        raise FileError(f"{source.source}: has both 'rope_parameters' and 'rope_scaling'; leave one of them")
    rope = ConfigReader(newer or older, f"{source.source}, rope")
    inner = rope.optional("rope_theta", float)
    theta = inner if inner is not None else theta
    kind = rope.optional("rope_type", str)
    kind = kind or rope.take("type", str, "default")
    rope.require("type", kind)  # some files give both
    if kind not in _SCALINGS:
        raise FileError(f"{rope.source}: the scaling {kind!r} is not implemented; qkv knows {', '.join(_SCALINGS)}")
    scaling = _SCALINGS[kind](rope, context)
    rope.require("partial_rotary_factor", 1.0)
    rope.finish()
    return RoPEConfig(theta=10_000.0 if theta is None else theta, scaling=scaling)


def _yarn(rope: ConfigReader, context: int) -> YaRNScalingConfig:
    original = rope.take_positive("original_max_position_embeddings", context)
    factor = rope.take("factor", float, context / original)
    mscale, mscale_all = rope.optional("mscale", float), rope.optional("mscale_all_dim", float)
    magnitude = rope.optional("attention_factor", float)
    if magnitude is None and mscale and mscale_all and factor > 1:  # DeepSeek's way to say it
        magnitude = (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
    return YaRNScalingConfig(
        factor=factor,
        original_length=original,
        beta_fast=rope.optional("beta_fast", float) or 32.0,
        beta_slow=rope.optional("beta_slow", float) or 1.0,
        attention_factor=magnitude,
        truncate=rope.take("truncate", bool, True),
    )


def _llama3(rope: ConfigReader, context: int) -> Llama3ScalingConfig:
    return Llama3ScalingConfig(
        factor=rope.take("factor", float),
        original_length=rope.take_positive("original_max_position_embeddings", context),
        low_freq_factor=rope.take("low_freq_factor", float),
        high_freq_factor=rope.take("high_freq_factor", float),
    )


def _dynamic(rope: ConfigReader, context: int) -> RoPEScalingConfig:
    rope.optional("original_max_position_embeddings", int)  # Hugging Face goes by the context, too
    return DynamicNTKScalingConfig(factor=rope.take("factor", float), original_length=context)


_SCALINGS = {
    "default": lambda rope, context: None,
    "linear": lambda rope, context: LinearScalingConfig(factor=rope.take("factor", float)),
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}


def keys(config: TransformerConfig) -> KeyMap:
    """The map between Hugging Face's keys and ours."""
    n_layers, block = one_block(config)
    attention, glu = attention_of(block), block.sublayers[1]
    assert isinstance(glu, GLUConfig)
    head_dim = attention.head_dim or config.d_model // attention.n_heads
    fuse_qkv = FuseQKV(attention.n_heads, attention.n_kv_heads or attention.n_heads, head_dim, head_dim)
    fuse_gate = Fuse((glu.width(config.d_model),) * 2)
    ours, theirs = "blocks.{}.sublayers", "model.layers.{}"
    rules = [
        Rule("model.embed_tokens.weight", "embed.weight"),
        Rule("model.norm.weight", "final_norm.weight"),
        Rule(f"{theirs}.input_layernorm.weight", "blocks.{}.norms.attention.weight"),
        Rule(f"{theirs}.post_attention_layernorm.weight", "blocks.{}.norms.ffn.weight"),
    ]
    for part in ("weight", "bias"):
        if part == "weight" or attention.bias:
            qkv = tuple(f"{theirs}.self_attn.{name}_proj.{part}" for name in "qkv")
            rules += [
                Rule(qkv, f"{ours}.attention.qkv_proj.{part}", fuse_qkv),
                Rule(f"{theirs}.self_attn.o_proj.{part}", f"{ours}.attention.o_proj.{part}"),
            ]
        if part == "weight" or glu.bias:
            gate_up = tuple(f"{theirs}.mlp.{name}_proj.{part}" for name in ("gate", "up"))
            rules += [
                Rule(gate_up, f"{ours}.ffn.gate_up_proj.{part}", fuse_gate),
                Rule(f"{theirs}.mlp.down_proj.{part}", f"{ours}.ffn.down_proj.{part}"),
            ]
    if isinstance(config.head, LMHeadConfig) and not config.head.tied:
        rules.append(Rule("lm_head.weight", "head.weight"))
    return KeyMap(rules, n_layers, ignore=(f"{theirs}.self_attn.rotary_emb.inv_freq",))


LLAMA = Family(read, keys, prefix="model.", head="lm_head.weight", table="model.embed_tokens.weight")
