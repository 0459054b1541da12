"""Mistral (Jiang et al. 2023): Llama with a sliding window in every layer, where the config has one."""

from qkv.checkpoints.families.decoder import Decoder

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
).family()
