"""What each kind of attention is, apart from how it is computed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qkv import (
    ALiBiConfig,
    AttentionConfig,
    Causal,
    CrossAttentionConfig,
    Full,
    LatentAttentionConfig,
    RMSNormConfig,
    RoPEConfig,
    T5BiasConfig,
    Tokens,
    Window,
)
from qkv.errors import ConfigError
from qkv.models.stack import Repeat
from qkv.nn.blocks import PreNormConfig
from qkv.ops import attention_weights
from tiny import tiny_config, tiny_model, token_ids
from tolerances import FLOAT64


def close(got, want, tolerance=FLOAT64):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def built(config, d_model=16, seed=0):
    torch.manual_seed(seed)
    layer = config.build(d_model).double().eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.4)
    return layer


class Products(TorchDispatchMode):
    """Counts matrix products and calls of attention kernels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name in ("mm", "addmm", "bmm", "baddbmm") or "attention" in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_self_attention_is_four_matrix_products():
    layer, x = (
        built(AttentionConfig(n_heads=4, n_kv_heads=2, mask=Causal(), position=RoPEConfig())),
        torch.randn(2, 6, 16).double(),
    )
    with Products() as fast, torch.no_grad():
        layer(x)
    assert fast.names == ["mm", "_scaled_dot_product_flash_attention_for_cpu", "mm"]  # the kernel holds two of them
    with Products() as plain, torch.no_grad():
        q, k, v = (torch.randn(2, h, 6, 4).double() for h in (4, 4, 4))
        weights = attention_weights(q, k, mask=Causal(), scale=0.5)
        torch.einsum("bhts,bhsv->bhtv", weights, v)
    assert plain.names == ["bmm", "bmm"]


def test_without_positions_self_attention_is_permutation_equivariant():
    layer, x, order = built(AttentionConfig(n_heads=4, mask=Full())), torch.randn(2, 7, 16).double(), torch.randperm(7)
    with torch.no_grad():
        close(layer(x[:, order])[0], layer(x)[0][:, order])


def test_cross_attention_ignores_the_order_of_keys_and_follows_that_of_queries():
    layer = built(
        CrossAttentionConfig(n_heads=4, n_kv_heads=2, mask=Full(), memory_dim=10, value_dim=6, qk_norm=RMSNormConfig())
    )
    x, memory = torch.randn(2, 5, 16).double(), torch.randn(2, 9, 10).double()
    keys, queries = torch.randperm(9), torch.randperm(5)
    with torch.no_grad():
        want, _ = layer(x, memory=memory)
        close(layer(x, memory=memory[:, keys])[0], want)
        close(layer(x[:, queries], memory=memory)[0], want[:, queries])
    with pytest.raises(ConfigError, match="give it memory="):
        layer(x)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_torch_multihead_attention(kind):
    """Parity with torch.nn.MultiheadAttention, with biases, and keys of another width."""
    torch.manual_seed(0)
    width = 16 if kind == "self" else 10
    theirs = torch.nn.MultiheadAttention(16, 4, bias=True, kdim=width, vdim=width, batch_first=True).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.4)
    x, memory = torch.randn(2, 5, 16).double(), torch.randn(2, 7, width).double()
    if kind == "self":
        q, k, v = theirs.in_proj_weight.chunk(3)
        config, source = AttentionConfig(n_heads=4, mask=Causal(), bias=True), x
    else:
        q, k, v = theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight
        config, source = CrossAttentionConfig(n_heads=4, mask=Full(), memory_dim=10, bias=True), memory
    ours = config.build(16).double()
    biases = theirs.in_proj_bias.chunk(3)

    def rows(*parts):
        return torch.cat([x.unflatten(0, (4, 4)) for x in parts], 1).flatten(0, 1)

    with torch.no_grad():
        if kind == "self":
            ours.qkv_proj.weight.copy_(rows(q, k, v))
            ours.qkv_proj.bias.copy_(rows(*biases))
        else:
            ours.q_proj.weight.copy_(q)
            ours.q_proj.bias.copy_(biases[0])
            ours.kv_proj.weight.copy_(rows(k, v))
            ours.kv_proj.bias.copy_(rows(*biases[1:]))
        ours.o_proj.load_state_dict(theirs.out_proj.state_dict())
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1) if kind == "self" else None
        want, _ = theirs(x, source, source, attn_mask=mask, need_weights=False)
        got, _ = ours(x) if kind == "self" else ours(x, memory=memory)
    close(got, want)


LATENT = LatentAttentionConfig(
    n_heads=4, mask=Causal(), norm=RMSNormConfig(), kv_rank=12, plain_dim=8, rotary_dim=4, value_dim=6, q_rank=10
)


def latent_model(config=LATENT):
    import dataclasses

    plain = tiny_config()
    block = PreNormConfig(norm=RMSNormConfig(), sublayers=(config, plain.blocks.pattern.sublayers[1]))
    return tiny_model(config=dataclasses.replace(plain, blocks=Repeat(n=2, pattern=block)))


@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(size=3)], ids=["causal", "window"])
def test_latent_attention_absorbed_equals_expanded(mask):
    import dataclasses

    model, ids = latent_model(dataclasses.replace(LATENT, mask=mask)), token_ids(2, 9)
    layer = model.blocks[0].sublayers["attention"]
    with torch.no_grad():
        want = model(ids)
        for few in (0, 100):
            for block in model.blocks:
                block.sublayers["attention"].few = few
            cache = model.make_cache(2, 30)
            got = torch.cat([model(ids[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 9))], 1)
            close(got, want)
    assert layer.cache_shape()[:3] == (1, 16, 0)
    with torch.no_grad():
        ragged = model(ids, Tokens.padded([9, 4], side="left"))
        close(ragged[1:, 5:], model(ids[1:, 5:]))


def test_scores_by_distance():
    """ALiBi's slopes are those of the paper; T5 shares what lies far away."""
    like = torch.zeros((), dtype=torch.float64)
    eight = ALiBiConfig().build(8)(5, like)
    assert eight[:, 4].tolist() == [0.0] * 8
    assert eight[:, 3].tolist() == [-(2.0**-i) for i in range(1, 9)]
    assert torch.equal(eight, eight.flip(1))
    t5 = built(T5BiasConfig(buckets=8, max_distance=16), d_model=4)
    table = t5(100, like)
    assert table.shape == (4, 33)
    assert torch.equal(table[:, 17:], table[:, 16:17].expand(-1, 16))  # one-sided: what comes after is like itself
    assert torch.equal(table[:, 0], table[:, 1])


@pytest.mark.parametrize("position", [ALiBiConfig(), T5BiasConfig(), RoPEConfig(fraction=0.5)], ids=lambda p: p.tag())
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "sinks": True}], ids=["plain", "softcap and sinks"])
def test_every_option_keeps_the_laws(position, options):
    """The harness itself, on models with each option: padding, packing, caches, the future."""
    from qkv.laws import assert_laws

    for mask in (Causal(), Causal() & Window(size=4)):
        assert_laws(tiny_model(position=position, mask=mask, **options))
