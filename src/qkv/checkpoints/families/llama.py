"""Llama (Touvron et al. 2023; Grattafiori et al. 2024): the family that the others are told apart from."""

from qkv.checkpoints.families.decoder import ATTENTION_BIAS, MLP_BIAS, Decoder

LLAMA = Decoder(
    name="llama",
    architecture="LlamaForCausalLM",
    defaults={"vocab_size": 32_000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    keys=(ATTENTION_BIAS, MLP_BIAS),
    fixed={"rope_interleaved": False},
    harmless=("is_llama_config",),
).family()
