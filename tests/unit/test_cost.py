import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qkv.cost import mean_keys, summary, training_flops_per_token
from qkv.errors import ConfigError
from qkv.masks import Causal, Chunked, Full, Window, dense
from qkv.models.stack import Repeat
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.nn.blocks import ParallelConfig, PreNormConfig, SandwichConfig
from qkv.nn.embedders import TokenEmbedderConfig, VectorEmbedderConfig
from qkv.nn.ffn import FFNConfig
from qkv.nn.heads import LMHeadConfig, VectorHeadConfig
from qkv.nn.norms import RMSNormConfig
from qkv.nn.positions import LearnedPositionsConfig
from qkv.presets import PRESETS, gpt2, preset
from qkv.tokens import Tokens

PUBLISHED = {
    "gpt2": 124_439_808, "llama3-8b": 8_030_261_248, "smollm2-135m": 134_515_008, "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768, "qwen3-0.6b": 596_049_920, "gemma2-2b": 2_614_341_888, "phi3-mini": 3_821_079_552,
    "olmo2-1b": 1_484_916_736, "pythia-160m": 162_322_944,
}  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_published_counts(name, parameters):
    assert summary(preset(name)).parameters == parameters


def by_hand(**changes):
    """Width 4, two blocks with 2 heads, 1 kv head of width 3, FFN of width 5, 7 tokens; biases nowhere."""
    attention = AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=3, mask=Causal())
    block = PreNormConfig(norm=RMSNormConfig(), sublayers=(attention, FFNConfig(d_ff=5)))
    config = TransformerConfig(
        d_model=4,
        embed=TokenEmbedderConfig(vocab_size=7),
        blocks=Repeat(n=2, pattern=block),
        final_norm=RMSNormConfig(),
        head=LMHeadConfig(tied=True),
    )
    return dataclasses.replace(config, **changes)


QKV, OUT, FFN, NORM, TABLE = 4 * (2 + 1 + 1) * 3, 2 * 3 * 4, 2 * 4 * 5, 4, 7 * 4


def test_a_small_model_by_hand():
    cost = summary(by_hand(), context=9, dtype=torch.bfloat16)
    embed, blocks, norm, head = cost.parts
    assert [part.parameters for part in cost.parts] == [TABLE, 2 * (QKV + OUT + FFN + 2 * NORM), NORM, 0]
    norms, attention, ffn = blocks.parts
    assert [part.parameters for part in blocks.parts] == [2 * 2 * NORM, 2 * (QKV + OUT), 2 * FFN]
    # Under a causal mask 9 tokens see 1 to 9 keys, 5 on average; q·k and the sum of values take 3 multiply-adds a key.
    assert attention.flops == 2 * (2 * (QKV + OUT) + 2 * 5 * 2 * (3 + 3))
    assert (embed.flops, norms.flops, ffn.flops, norm.flops, head.flops) == (0, 0, 2 * 2 * FFN, 0, 2 * TABLE)
    assert cost.flops_per_token == attention.flops + ffn.flops + head.flops
    assert cost.training_flops_per_token == 3 * cost.flops_per_token == training_flops_per_token(by_hand(), 9)
    assert cost.weight_bytes == 2 * cost.parameters
    assert cost.cache_bytes_per_token == 2 * 2 * (3 + 3)  # 2 bytes, 2 layers, a key and a value of one head


def test_shared_weights_count_once_and_work_twice():
    twice = summary(by_hand(), context=9)
    shared = summary(by_hand(blocks=dataclasses.replace(by_hand().blocks, shared=True)), context=9)
    assert 2 * shared.parts[1].parameters == twice.parts[1].parameters
    assert shared.flops_per_token == twice.flops_per_token
    assert shared.cache_bytes_per_token == twice.cache_bytes_per_token


def test_an_untied_head_has_a_table_of_its_own():
    assert summary(by_hand(head=LMHeadConfig(tied=False))).parameters == summary(by_hand()).parameters + TABLE


ATTENTION = AttentionConfig(n_heads=2, mask=Full(), qk_norm=RMSNormConfig(), bias=True)
ODD = {
    "mixed stack": by_hand(
        blocks=(
            ParallelConfig(norm=RMSNormConfig(), sublayers=(ATTENTION, FFNConfig())),
            Repeat(n=3, pattern=(SandwichConfig(norm=RMSNormConfig(), sublayers=(ATTENTION, ATTENTION)),) * 2),
        )
    ),
    "vectors": by_hand(embed=VectorEmbedderConfig(n_features=6), head=VectorHeadConfig(n_out=2)),
    "no head": by_hand(head=None, final_norm=None),
    "no blocks": by_hand(blocks=()),
}
BUILDABLE = {name: config for name, build in PRESETS.items() if not (config := build()).embed.left_open} | ODD


@pytest.mark.parametrize("config", BUILDABLE.values(), ids=BUILDABLE.keys())
def test_the_same_count_as_the_built_model(config):
    with torch.device("meta"):
        model = config.build()
    cost = summary(config)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    cache = model.make_cache(1, 1)
    assert cost.cache_bytes_per_token == sum(t[:, :, :1].numel() * 4 for held in cache._held.values() for t in held)


def test_flops_are_those_that_pytorch_counts():
    # Under a full mask both counts follow one convention. PyTorch counts its formula, but not its kernels for the CPU.
    attention = AttentionConfig(n_heads=2, n_kv_heads=1, mask=Full())
    block = PreNormConfig(norm=RMSNormConfig(), sublayers=(attention, FFNConfig(d_ff=5)))
    config = by_hand(blocks=Repeat(n=2, pattern=block))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        config.build()(torch.zeros(1, 11, dtype=torch.long))
    assert counter.get_total_flops() == 11 * summary(config, context=11).flops_per_token


MASKS = [
    Full(),
    Causal(),
    Window(size=3),
    Causal() & Window(size=4),
    Chunked(size=5),
    ~Causal(),
    Causal() | Window(size=2),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_mean_keys(mask):
    tokens = Tokens.full(1, 13)
    assert mean_keys(mask, 13) == dense(mask, tokens, tokens).sum() / 13


def test_mean_keys_of_a_long_text_is_close():
    # A causal window of 1000 over 20 000 tokens: the first 1000 see less, on average half. Sampling errs by a token.
    exact = (1000 * 1001 / 2 + 19_000 * 1000) / 20_000
    assert mean_keys(Causal() & Window(size=1000), 20_000) == pytest.approx(exact, abs=1)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (preset("small"), "set by the tokenizer"),
        (by_hand(embed=TokenEmbedderConfig(position=LearnedPositionsConfig(length=8))), "set by the tokenizer"),
        (by_hand(embed=VectorEmbedderConfig(), head=VectorHeadConfig()), "set by the data"),
    ],
)
def test_what_the_data_will_set_is_left_out_and_said(config, said):
    cost = summary(config)
    assert [part.open for part in cost.parts] == [said, "", "", said]
    assert cost.parts[-1].parameters == 0
    assert cost.parts[0].parameters == (8 * 4 if config.embed.position else 0)


def test_the_context_is_the_configs_unless_given():
    config = gpt2(d_model=8, n_layers=1, n_heads=2, vocab_size=5, context=16)
    assert summary(config).context == 16
    assert summary(config, context=4).context == 4
    assert summary(by_hand()).context == 1024
    with pytest.raises(ConfigError, match="context=0 must be at least 1"):
        summary(config, context=0)
