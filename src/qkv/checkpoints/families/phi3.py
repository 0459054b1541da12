"""Phi-3 (Abdin et al. 2024): Llama with fused weights, windows, rotation of a share of each head, and LongRoPE."""

from qkv.checkpoints.families.decoder import DROPOUTS, Decoder
from qkv.checkpoints.families.rope import RopeKeys

PHI3 = Decoder(
    name="phi3",
    architecture="Phi3ForCausalLM",
    defaults={"vocab_size": 32_064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    keys=DROPOUTS,
    windows="all",
    rope=RopeKeys(fraction="partial_rotary_factor", original=4096),
    fused=True,
    fixed={
        "attention_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
    },
).family()
