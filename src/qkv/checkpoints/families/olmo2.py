"""OLMo 2 (OLMo Team 2024): norms of what sublayers put out, and of queries and keys over all heads at once."""

from qkv.checkpoints.families.decoder import ATTENTION_BIAS, Decoder
from qkv.nn.blocks import OutputNormConfig

OLMO2 = Decoder(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    defaults={"vocab_size": 50_304, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    keys=(ATTENTION_BIAS,),
    settings={"attention.qk_norm_over": "heads"},
    block=OutputNormConfig,
    norms={"post_attention_layernorm": "norms.attention", "post_feedforward_layernorm": "norms.ffn"},
    qk_norm=True,
).family()
