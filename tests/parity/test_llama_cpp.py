"""GGUF files before llama.cpp: it loads what `qkv convert --to gguf` writes, and its logits are those of transformers.

`pip install -e '.[judge]'` compiles llama.cpp (some minutes); without it these tests are skipped.
"""

import pytest
import torch
import transformers

from chats import chat_tokenizer
from qkv.loading.convert import convert

llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed; pip install -e '.[judge]'")

LENGTH = 40
TOKENIZER = chat_tokenizer("what is this and that Hello " * 20)
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 269, "max_position_embeddings": 64, "rms_norm_eps": 1e-3,
    "bos_token_id": None, "eos_token_id": 268, "pad_token_id": None,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.5, 1.2, 3.0, 1.0, 1.0],
            "long_factor": [2.0, 5.0, 3.0, 4.0, 2.0, 1.0], "partial_rotary_factor": 0.75}  # fmt: skip
GEMMA = {"head_dim": 24, "sliding_window": 8, "query_pre_attn_scalar": 24}
NEOX = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
GPT2 = {
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "n_inner": 96,
    "vocab_size": 269,
    "eos_token_id": 268,
}

CASES = {
    "llama": ("llama", SIZES | {"rope_parameters": ROPE}),
    "llama, tied, wide heads": (
        "llama", SIZES | {"rope_parameters": ROPE, "head_dim": 24, "tie_word_embeddings": True}
    ),
    "llama, biases": ("llama", SIZES | {"rope_parameters": ROPE, "attention_bias": True}),
    "llama 3": (
        "llama",
        SIZES | {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}},
    ),
    "llama, linear": ("llama", SIZES | {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 3.0}}),
    "llama, yarn": ("llama", SIZES | {"rope_parameters": YARN}),
    "mistral": ("mistral", SIZES | {"rope_parameters": ROPE, "sliding_window": None}),
    "qwen2": ("qwen2", SIZES | {"rope_parameters": ROPE}),
    "qwen2, tied, yarn": ("qwen2", SIZES | {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", SIZES | {"rope_parameters": ROPE, "head_dim": 24}),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied": ("gpt2", GPT2 | {"tie_word_embeddings": False}),
    "gemma2": ("gemma2", SIZES | GEMMA | {"rope_parameters": ROPE}),
    "gemma3": (
        "gemma3_text",
        SIZES | GEMMA | {"num_hidden_layers": 7, "rope_parameters": {
            "full_attention": ROPE, "sliding_attention": ROPE | {"rope_theta": 10000.0}}},
    ),
    "gemma3, scaled": (
        "gemma3_text",
        SIZES | GEMMA | {"num_hidden_layers": 7, "rope_parameters": {
            "full_attention": ROPE | {"rope_type": "linear", "factor": 8.0},
            "sliding_attention": ROPE | {"rope_theta": 10000.0}}},
    ),
    "phi3": ("phi3", SIZES | {"rope_parameters": ROPE, "original_max_position_embeddings": 64}),
    "phi3, part of a head": (
        "phi3",
        SIZES | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}, "original_max_position_embeddings": 64},
    ),
    "phi3, window": (  # llama.cpp has none, so it has to be longer than the text
        "phi3", SIZES | {"rope_parameters": ROPE, "original_max_position_embeddings": 64, "sliding_window": 64}
    ),
    "phi3, longrope": ("phi3", SIZES | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "olmo2": ("olmo2", SIZES | {"rope_parameters": ROPE}),
    "olmo2, tied": ("olmo2", SIZES | {"rope_parameters": ROPE, "tie_word_embeddings": True}),
    "olmo2, yarn": ("olmo2", SIZES | {"rope_parameters": YARN}),
    "gpt_neox": (
        "gpt_neox", NEOX | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}}
    ),
    "gpt_neox, one after the other, tied": (
        "gpt_neox",
        NEOX | {"rope_parameters": ROPE, "use_parallel_residual": False, "tie_word_embeddings": True},
    ),
}  # fmt: skip


def build(kind, settings):
    """A model of `transformers` with large weights, so that a wrong order of rows shows."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            around = 1.0 if ("norm" in name or "ln_" in name) and "gemma" not in kind else 0.0
            p.normal_(std=0.2).add_(around)
            p.copy_(p.bfloat16())  # so that the sums of Gemma's norms are exact
    return model


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_logits_of_transformers(tmp_path, case):
    model = build(*CASES[case])
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    TOKENIZER.save(folder)
    path = convert(folder, tmp_path / "x.gguf", to="gguf", dtype="float32")
    judge = llama_cpp.Llama(
        str(path), n_ctx=64, n_batch=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    ids = torch.randint(0, 256, (LENGTH,), generator=torch.Generator().manual_seed(2)).tolist()
    judge.eval(ids)
    got = torch.tensor(judge.scores[:LENGTH])
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    assert want.std() > 0.4
    # llama.cpp looks GELU up in a table of float16, and keeps masks and some products in it.
    assert (got - want).abs().max() < 4e-3 * want.abs().max()
