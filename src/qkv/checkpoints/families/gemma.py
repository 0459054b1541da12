"""Gemma 2 and 3 (Gemma Team 2024, 2025): a norm on both sides of each sublayer, windows in most layers.

Their embeddings are multiplied with √D and the weights of their norms count from 1. Gemma 2 bounds scores and logits;
Gemma 3 norms queries and keys instead, and has a base of its own for the rotations in layers with windows.
"""

from qkv.checkpoints.families.decoder import ATTENTION_BIAS, SANDWICH_NORMS, SOFTCAPS, Decoder
from qkv.checkpoints.families.rope import RopeKeys
from qkv.nn.blocks import SandwichConfig

_DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

_KEYS = (ATTENTION_BIAS, *SOFTCAPS)
_SETTINGS = {"norm.offset": 1.0, "embed.scale": None}

GEMMA2 = Decoder(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    defaults=_DEFAULTS
    | {
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    keys=_KEYS,
    activation="hidden_activation",
    settings=_SETTINGS,
    block=SandwichConfig,
    norms=SANDWICH_NORMS,
    windows=2,
    query_scalar=True,
    fixed={"use_bidirectional_attention": False},
    harmless=("hidden_act",),  # of the first files; `hidden_activation` beside it is what counts
).family()

GEMMA3_TEXT = Decoder(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    defaults=_DEFAULTS | {"vocab_size": 262_208, "max_position_embeddings": 131_072},
    keys=_KEYS,
    activation="hidden_activation",
    settings=_SETTINGS,
    block=SandwichConfig,
    norms=SANDWICH_NORMS,
    qk_norm=True,
    windows=6,
    rope=RopeKeys(base=1_000_000.0),
    local_rope=True,
    query_scalar=True,
    fixed={"use_bidirectional_attention": False},
).family()
