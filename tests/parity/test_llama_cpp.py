"""GGUF files before llama.cpp: it loads what `qkv convert --to gguf` writes, and its logits are those of transformers.

`pip install -e '.[judge]'` installs llama.cpp as a wheel; without it these tests are skipped.
"""

import json
import re
import shutil
import unicodedata
import urllib.request

import pytest
import torch
import transformers

from chats import chat_tokenizer
from drawn import DECODERS, drawn_config, wide_weights
from qkv.checkpoints.gguf import HuggingFace, family_for_gguf, from_huggingface, write_gguf
from qkv.checkpoints.huggingface import save_model
from qkv.data import BPETokenizerConfig
from qkv.data.gguf_vocabulary import RULES, read_vocabulary, write_vocabulary
from qkv.errors import ConfigError, FileError
from qkv.loading.convert import convert
from qkv.loading.loaded import Loaded

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed; pip install -e '.[judge]'")

LENGTHS = 3, 40
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
    "bos_token_id": None,
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
    "gemma": ("gemma", SIZES | {"rope_parameters": ROPE, "head_dim": 24}),
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
    "olmo3": ("olmo3", SIZES | {"num_hidden_layers": 5, "sliding_window": 8}),
    "olmo3, yarn": (
        "olmo3",
        SIZES | {"num_hidden_layers": 5, "sliding_window": 8, "rope_parameters": {
            "full_attention": YARN, "sliding_attention": ROPE}},
    ),
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


def parameters(path):
    """Of a judge that is quiet and exact."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = str(path), 256, 1, 0, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return params


def judged(path, prompts):
    """The logarithms of the probabilities of the token after each prompt, (prompts, vocabulary), by llama.cpp."""
    server, rows = xllamacpp.Server(parameters(path)), []
    for prompt in prompts:
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": 269, "cache_prompt": False}
        asked["logit_bias"] = [[40, 1e4]]  # the drawn token, which the answer has to be a whole character of
        answer = server.handle_completions(asked)
        assert "choices" in answer, answer
        (choice,) = answer["choices"]
        found = {each["id"]: each["logprob"] for each in choice["logprobs"]["content"][0]["top_logprobs"]}
        assert sorted(found) == list(range(269))
        rows.append([found[i] for i in range(269)])
    return torch.tensor(rows)


@torch.no_grad()
def agree(path, model):
    ids = torch.randint(0, 256, (max(LENGTHS),), generator=torch.Generator().manual_seed(2)).tolist()
    longrope = "short_factor" in str(model.config.to_dict())  # by the room that is asked for there, not by the text
    prompts = [ids[:n] for n in LENGTHS[longrope:]]
    got = judged(path, prompts)
    want = torch.stack([model(torch.tensor([prompt])).logits[0, -1].float() for prompt in prompts])
    # llama.cpp looks GELU up in a table of float16, and keeps masks and some products in it.
    assert (got - want.log_softmax(-1)).abs().max() < 4e-3 * want.abs().max().clamp(1)
    return want


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_logits_of_transformers(tmp_path, case):
    model = build(*CASES[case])
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    TOKENIZER.save(folder)
    want = agree(convert(folder, tmp_path / "x.gguf", to="gguf", dtype="float32"), model)
    assert want.std() > 0.4


def test_words_are_split_as_in_llama_cpp(tmp_path):
    """By each name of a rule."""
    texts = [
        "The cat's 12345 hats, IT'S 3.5 — naïve café!\n\n  x = 1\r\n\t you're 7890 élan",
        " 你好世界 12 こんにちは 😀😀 a_b $x += `y` || z ",
        "e\u0301a  \n \n  the the THE'LL 1 22 333 4444",
    ]
    corpus = [*texts, "the cat sat on the mat 12 345 it's you're naïve 你好 = += x 1 \n\n  a 😀 "] * 3
    tokenizer = BPETokenizerConfig(vocab_size=600).train(corpus)
    config = drawn_config("llama", 0, vocab=600)
    family = family_for_gguf(config, "x")
    state = family.keys(config).to_theirs(dict(config.build().state_dict()))
    metadata, tensors = from_huggingface(HuggingFace(family.write(config), state, {}))
    for pre in RULES:
        words = write_vocabulary(tokenizer, size=600) | {"tokenizer.ggml.pre": pre}
        write_gguf(tmp_path / "x.gguf", metadata | words, tensors)
        server = xllamacpp.Server(parameters(tmp_path / "x.gguf"))
        ours = read_vocabulary(words, source="x").tokenizer
        for text in texts:
            text = unicodedata.normalize("NFC", text) if RULES[pre].compose else text
            body = json.dumps({"content": text, "add_special": False}).encode()
            asked = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "text/json"})
            with urllib.request.urlopen(asked) as answer:
                theirs = json.load(answer)["tokens"]
            assert theirs == ours.encode(text), (pre, text)


DRAWS = 20


@pytest.mark.parametrize("kind", DECODERS)
def test_a_drawn_model_is_written_right_or_refused_in_a_line(tmp_path, kind):
    written = 0
    for seed in range(DRAWS):
        config, folder, refusal = drawn_config(kind, seed, vocab=269), tmp_path / str(seed), ""
        model = wide_weights(config.build(), seed)
        try:
            save_model(model, folder / "hf", family=kind, files=Loaded.of(model, TOKENIZER).files())
            convert(folder / "hf", folder / "x.gguf", to="gguf", dtype="float32")
        except (ConfigError, FileError, UserWarning) as error:
            refusal = str(error)
        assert re.fullmatch(r"(.{20,260})?", refusal), config
        if not refusal:
            written += 1
            agree(folder / "x.gguf", transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval())
        shutil.rmtree(folder, ignore_errors=True)
    assert written >= 2
