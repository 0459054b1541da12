"""Tiny random models made by `transformers`, saved to a folder and loaded by qkv: the logits must be the same.

The weights are large, so that a wrong pairing of heads, exponent, order of gate and up or epsilon shows.
"""

import json

import pytest
import torch
import transformers

from qkv.checkpoints.huggingface import load_model
from qkv.tokens import Tokens
from tolerances import FLOAT64, HF_FLOAT32_INSIDE

LENGTH, VOCAB = 23, 61


def save(model, folder):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # Norm weights around 1, the rest around 0: wide enough that every part shows in the logits.
            p.normal_(std=0.25).add_(1.0 if "norm" in name or "ln_" in name else 0.0)
    model.save_pretrained(folder)
    return model


def compare(model, folder, tolerance, length=LENGTH):
    ours = load_model(folder)
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    torch.manual_seed(2)
    ids = torch.randint(0, VOCAB, (2, length))
    with torch.no_grad():
        want, got = model(ids).logits, ours(ids)
    assert want.std() > 0.5, "the reference is too tame to show a wrong convention"
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


GPT2_CASES = {
    "plain": {},
    "untied, wide inner": {"tie_word_embeddings": False, "n_inner": 37},
    "erf gelu, no scale, other eps": {
        "activation_function": "gelu",
        "scale_attn_weights": False,
        "layer_norm_epsilon": 1e-2,
    },
}


@pytest.mark.parametrize("case", GPT2_CASES.values(), ids=GPT2_CASES.keys())
def test_gpt2(tmp_path, case):
    settings = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 30, "n_layer": 3, "n_head": 5} | case
    config = transformers.GPT2Config(**settings, attn_implementation="eager")
    compare(save(transformers.GPT2LMHeadModel(config).double().eval(), tmp_path), tmp_path, FLOAT64)


LLAMA_CASES = {
    "multi-head, tied": {"num_key_value_heads": 6, "tie_word_embeddings": True},
    "grouped, untied": {"num_key_value_heads": 2},
    "multi-query, biases": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "wide heads, gelu, other eps": {
        "num_key_value_heads": 3,
        "head_dim": 14,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-2,
    },
}


def llama(**case):
    settings = {
        "vocab_size": VOCAB, "hidden_size": 36, "intermediate_size": 41, "num_hidden_layers": 3,
        "num_attention_heads": 6, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }  # fmt: skip
    config = transformers.LlamaConfig(**settings | case, attn_implementation="eager")
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("case", LLAMA_CASES.values(), ids=LLAMA_CASES.keys())
def test_llama(tmp_path, case):
    compare(save(llama(**case), tmp_path), tmp_path, HF_FLOAT32_INSIDE)


ROPE_CASES = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic, short": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, all its options": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0, "beta_slow": 0.5,
        "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", ["newer", "older"])
@pytest.mark.parametrize("rope", ROPE_CASES.values(), ids=ROPE_CASES.keys())
def test_rope_scaling(tmp_path, rope, layout):
    model = save(llama(num_key_value_heads=2, head_dim=12, rope_parameters=rope | {"rope_theta": 500.0}), tmp_path)
    if layout == "older":
        path = tmp_path / "config.json"
        data = json.loads(path.read_text())
        rope = data.pop("rope_parameters")
        data["rope_theta"] = rope.pop("rope_theta")
        data["rope_scaling"] = rope | {"type": rope.pop("rope_type")}
        path.write_text(json.dumps(data))
    compare(model, tmp_path, HF_FLOAT32_INSIDE)


def test_dynamic_ntk_beyond_the_original_length(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 500.0}
    model = save(llama(rope_parameters=rope, max_position_embeddings=16), tmp_path)
    compare(model, tmp_path, HF_FLOAT32_INSIDE, length=37)


def test_ntk_is_a_larger_theta(tmp_path):
    """Hugging Face has no static NTK scaling, so it is given the base that the formula makes."""
    import dataclasses

    from qkv.nn.positions import NTKScalingConfig, RoPEConfig

    width, factor, theta = 6, 5.0, 500.0
    larger = {"rope_type": "default", "rope_theta": theta * factor ** (width / (width - 2))}
    model = save(llama(rope_parameters=larger), tmp_path)
    ours = load_model(tmp_path)
    position = RoPEConfig(theta=theta, scaling=NTKScalingConfig(factor=factor))
    block = ours.config.blocks.pattern
    attention = dataclasses.replace(block.sublayers[0], position=position)
    block = dataclasses.replace(block, sublayers=(attention, *block.sublayers[1:]))
    config = dataclasses.replace(ours.config, blocks=dataclasses.replace(ours.config.blocks, pattern=block))
    scaled = config.build().double().eval()
    scaled.load_state_dict(ours.state_dict())
    ids = torch.randint(0, VOCAB, (2, LENGTH))
    with torch.no_grad():
        torch.testing.assert_close(scaled(ids), model(ids).logits, rtol=0, atol=HF_FLOAT32_INSIDE)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_left_padding_with_a_cache(tmp_path, family):
    """A ragged batch, padded left as Hugging Face wants it, and one more token from the cache."""
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=30, n_layer=2, n_head=5)
        model, tolerance = transformers.GPT2LMHeadModel(config), FLOAT64
    else:
        model, tolerance = llama(num_key_value_heads=2), HF_FLOAT32_INSIDE
    model = save(model.double().eval(), tmp_path)
    model.set_attn_implementation("sdpa")  # the eager one gives NaN for rows that are padded left
    ours = load_model(tmp_path)
    ids, lengths = torch.randint(0, VOCAB, (2, 10)), [9, 4]
    valid = torch.tensor([[1] * 9, [0] * 5 + [1] * 4])
    with torch.no_grad():
        mask = torch.cat([valid, torch.ones(2, 1, dtype=torch.long)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        want = model(ids, attention_mask=mask, position_ids=positions).logits
        cache = ours.make_cache(2, 16)
        first = ours(ids[:, :9], Tokens.padded(lengths, side="left"), cache=cache)
        last = ours(ids[:, 9:], cache=cache)
    torch.testing.assert_close(first[valid.bool()], want[:, :9][valid.bool()], rtol=0, atol=tolerance)
    torch.testing.assert_close(last, want[:, 9:], rtol=0, atol=tolerance)
