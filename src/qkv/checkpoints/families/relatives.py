"""Llama and its relatives, a table each."""

import dataclasses

from qkv.checkpoints.families.config_reader import Key
from qkv.checkpoints.families.decoder import ATTENTION_BIAS, DROPOUTS, MLP_BIAS, SANDWICH_NORMS, SOFTCAPS, Decoder
from qkv.checkpoints.families.rope import RopeKeys
from qkv.nn.blocks import OutputNormConfig, SandwichConfig

LLAMA = Decoder(
    name="llama",
    architecture="LlamaForCausalLM",
    defaults={"vocab_size": 32_000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    keys=(ATTENTION_BIAS, MLP_BIAS),
    width="multiple",
    fixed={"rope_interleaved": False},
    harmless=("is_llama_config",),
)
"""Touvron et al. 2023; Grattafiori et al. 2024."""

MISTRAL = Decoder(
    name="mistral",
    architecture="MistralForCausalLM",
    defaults={
        "vocab_size": 32_000,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    windows="all",
    fixed={"attention_bias": False, "mlp_bias": False},
)
"""Jiang et al. 2023: a sliding window in every layer, where the config has one."""

QWEN2 = Decoder(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    settings={"attention.bias": True, "attention.out_bias": False},
    windows="late",
    fixed={"use_mrope": False},
)
"""Yang et al. 2024: biases of q, k and v."""

QWEN3 = Decoder(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={**QWEN2.defaults, "head_dim": 128},
    keys=(ATTENTION_BIAS,),
    qk_norm=True,
    windows="late",
)
"""Yang et al. 2025: norms of queries and keys."""

OLMO2 = Decoder(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    defaults={"vocab_size": 50_304, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    keys=(ATTENTION_BIAS,),
    settings={"attention.qk_norm_over": "heads"},
    block=OutputNormConfig,
    norms={"post_attention_layernorm": "norms.attention", "post_feedforward_layernorm": "norms.ffn"},
    qk_norm=True,
)
"""OLMo Team 2024: norms of what sublayers put out, and of queries and keys over all heads at once."""

OLMO3 = dataclasses.replace(
    OLMO2,
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    defaults={**OLMO2.defaults, "sliding_window": 4096},
    windows=4,
    rope=RopeKeys(base=500_000.0),
    local_rope=RopeKeys(base=500_000.0),
)
"""OLMo Team 2025: as OLMo 2, with windows in three of four layers, whose rotations are not scaled."""

_TANH = "gelu_pytorch_tanh"
GEMMA = Decoder(
    name="gemma",
    architecture="GemmaForCausalLM",
    defaults={
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    keys=(ATTENTION_BIAS,),
    activation=Key("hidden_act", "ffn.activation", str, _TANH, meant={"gelu": _TANH}),  # the first files' mistake
    settings={"norm.offset": 1.0, "embed.scale": None},
    fixed={"use_bidirectional_attention": False, "hidden_activation": _TANH},
)
"""Gemma Team 2024: embeddings times √D, and norms whose weights count from 1."""

GEMMA2 = dataclasses.replace(
    GEMMA,
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    defaults={
        **GEMMA.defaults,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    keys=(ATTENTION_BIAS, *SOFTCAPS),
    activation=Key("hidden_activation", "ffn.activation", str, _TANH),
    block=SandwichConfig,
    norms=SANDWICH_NORMS,
    windows=2,
    query_scalar=True,
    width="multiple",
    fixed={"use_bidirectional_attention": False},
    harmless=("hidden_act",),  # of the first files; `hidden_activation` beside it is what counts
)
"""Gemma Team 2024: norms on both sides of each sublayer, windows in every other layer, soft-caps."""

_SIZES = {"vocab_size": 262_208, "max_position_embeddings": 131_072}
GEMMA3_TEXT = dataclasses.replace(
    GEMMA2,
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    defaults={key: value for key, value in GEMMA2.defaults.items() if "softcapping" not in key} | _SIZES,
    qk_norm=True,
    windows=6,
    keys=(ATTENTION_BIAS, SOFTCAPS[1]),
    rope=RopeKeys(base=1_000_000.0, stretched=True),
    local_rope=RopeKeys(theta="rope_local_base_freq"),
    fixed={**GEMMA2.fixed, "attn_logit_softcapping": None},  # `transformers` has the key and passes over it
    harmless=(),
)
"""Gemma Team 2025: norms of queries and keys, and another base of the rotations in layers with windows."""

PHI3 = Decoder(
    name="phi3",
    architecture="Phi3ForCausalLM",
    defaults={"vocab_size": 32_064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    keys=DROPOUTS,
    windows="all",
    rope=RopeKeys(fraction="partial_rotary_factor", original=4096),
    fused=True,
    width="exact",
    fixed={
        "attention_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
    },
)
"""Abdin et al. 2024: fused weights, windows, rotation of a share of each head, LongRoPE."""
