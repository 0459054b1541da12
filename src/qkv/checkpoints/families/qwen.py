"""Qwen 2 (Yang et al. 2024), with biases of q, k and v, and Qwen 3 (Yang et al. 2025), with their norms instead."""

from qkv.checkpoints.families.decoder import ATTENTION_BIAS, Decoder

_DEFAULTS = {
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}

QWEN2 = Decoder(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults=_DEFAULTS,
    settings={"attention.bias": True, "attention.out_bias": False},
    windows="late",
    fixed={"use_mrope": False},
).family()

QWEN3 = Decoder(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults=_DEFAULTS | {"head_dim": 128},
    keys=(ATTENTION_BIAS,),
    qk_norm=True,
    windows="late",
).family()
