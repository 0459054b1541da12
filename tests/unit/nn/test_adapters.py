"""Adapters: a zero one changes nothing, merged equals unmerged, and a slice touches its own rows only."""

import copy

import pytest
import torch
from torch import nn

from qkv.errors import ConfigError
from qkv.masks import Causal, Full
from qkv.nn.adapters import LoRAConfig, LoRALinear, adapter_state, add_adapters, load_adapters, merge_adapters
from qkv.nn.attention import AttentionConfig
from qkv.nn.cross import CrossAttentionConfig
from qkv.nn.ffn import FFNConfig, GLUConfig
from qkv.nn.latent import LatentAttentionConfig
from qkv.nn.norms import RMSNormConfig
from qkv.tokens import Tokens
from qkv.training import AdamWConfig
from qkv.training.optimizer import make_optimizer
from tiny import tiny_model, token_ids
from tolerances import FLOAT64

IDS = token_ids(3, 10)


def adapted(targets=None, *, rank=3, dropout=0.0, **settings):
    """A tiny model whose adapters say something."""
    model = tiny_model(**settings)
    add_adapters(model, LoRAConfig(rank=rank, alpha=2.0 * rank, dropout=dropout, targets=targets))
    generator = torch.Generator().manual_seed(5)
    for p in adapter_state(model).values():
        p.normal_(std=0.3, generator=generator)
    return model


def test_by_hand():
    """W x + alpha / rank · B A x, on the rows of one slice."""
    base = nn.Linear(2, 3, bias=True)
    layer = LoRALinear(base, {"k": torch.tensor([2, 0])}, LoRAConfig(rank=1, alpha=3.0))
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        base.bias.copy_(torch.tensor([10.0, 20.0, 30.0]))
        layer.lora_a["k"].copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_b["k"].copy_(torch.tensor([[5.0], [7.0]]))  # for rows 2 and 0
    # A x = 1·1 + 2·2 = 5; rows 2 and 0 gain 3·5·5 and 3·7·5.
    assert layer(torch.tensor([1.0, 2.0])).tolist() == [1 + 10 + 105, 2 + 20, 3 + 30 + 75]


def test_a_zero_adapter_changes_no_bit():
    plain, model = tiny_model(), tiny_model()
    add_adapters(model, LoRAConfig(dropout=0.5))
    assert torch.equal(model(IDS), plain(IDS))
    model.train()  # whatever is dropped
    assert torch.equal(model(IDS), plain(IDS))


@pytest.mark.parametrize("targets", [None, ("q",), ("v", "gate"), ("o", "down", "up", "k")])
def test_merged_equals_unmerged(targets):
    model, plain = adapted(targets), tiny_model()
    with torch.no_grad():
        want, without = model(IDS), plain(IDS)
        assert (want - without).abs().max() > 0.05
        merge_adapters(model)
        torch.testing.assert_close(model(IDS), want, rtol=0, atol=FLOAT64)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_merging_costs_one_rounding_of_each_weight():
    """Weights of float32, merged there, and both models computed in float64: the products' own roundings are left out.

    On SmolLM2 with adapters of rank 8 everywhere: 3e-6 of logits up to 32. In float32 its adapters are 5e-4 from the
    exact result and its merged weights 1e-4, whatever the product of A and B is computed in.
    """
    model = adapted().float()
    with torch.no_grad():
        want = copy.deepcopy(model).double()(IDS)
        merge_adapters(model)
        assert (model.double()(IDS) - want).abs().max() < 1e-6 * want.abs().max()


ROWS = {  # 4 heads of width 4 over 2 kv heads: 8 rows of queries, 4 of keys, 4 of values, and again
    "q": ("attention.qkv_proj", [*range(8), *range(16, 24)]),
    "k": ("attention.qkv_proj", [8, 9, 10, 11, 24, 25, 26, 27]),
    "v": ("attention.qkv_proj", [12, 13, 14, 15, 28, 29, 30, 31]),
    "o": ("attention.o_proj", [*range(16)]),
    "gate": ("ffn.gate_up_proj", [*range(8), *range(16, 24), *range(32, 40)]),  # d_ff=24: groups of 8 rows
    "up": ("ffn.gate_up_proj", [*range(8, 16), *range(24, 32), *range(40, 48)]),
    "down": ("ffn.down_proj", [*range(16)]),
}


@pytest.mark.parametrize("target", ROWS)
def test_a_slice_touches_its_own_rows_only(target):
    model, before = adapted((target,)), tiny_model().state_dict()
    merge_adapters(model)
    name, rows = ROWS[target]
    for key, after in model.state_dict().items():
        changed = (after != before[key]).reshape(len(after), -1).any(-1).nonzero()[:, 0].tolist()
        assert changed == (rows if key.endswith(f"{name}.weight") else []), key


def test_slices_of_every_sublayer_cover_their_projections():
    latent = LatentAttentionConfig(
        n_heads=4, mask=Causal(), norm=RMSNormConfig(), kv_rank=8, plain_dim=4, rotary_dim=2, value_dim=3
    )
    attention = AttentionConfig(n_heads=6, n_kv_heads=2, head_dim=5, value_dim=3, mask=Causal())
    cross = CrossAttentionConfig(n_heads=4, n_kv_heads=2, head_dim=6, mask=Full(), memory_dim=10)
    for config in (latent, attention, cross, FFNConfig(), GLUConfig()):
        part = config.build(16)
        for name, slices in part.slices().items():
            rows = torch.cat(list(slices.values())).sort().values
            assert torch.equal(rows, torch.arange(part.get_submodule(name).out_features)), (config.tag(), name)
        add_adapters(part, LoRAConfig())
        assert any(isinstance(module, LoRALinear) for module in part.modules())


def test_values_wider_than_keys_have_their_own_rows():
    part = AttentionConfig(n_heads=2, n_kv_heads=2, head_dim=1, value_dim=2, mask=Causal()).build(4)
    rows = {name: found.tolist() for name, found in part.slices()["qkv_proj"].items()}
    assert rows == {"q": [0, 4], "k": [1, 5], "v": [2, 3, 6, 7]}


def test_only_adapters_get_gradients_and_moments():
    model = adapted().train()
    optimizer = make_optimizer(AdamWConfig(), model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss, _ = model.loss(IDS[:, :-1], IDS[:, 1:])
    loss.backward()
    optimizer.step()
    adapters = set(adapter_state(model))
    assert {name for name, p in model.named_parameters() if p.grad is not None} == adapters
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == adapters
    held = sum(p.numel() for state in optimizer.state.values() for p in state.values() if p.dim() > 0)
    assert held == 2 * sum(p.numel() for p in adapter_state(model).values())


def test_the_gradient_is_that_of_the_merged_weight():
    """dL/dB = scale · dL/dW Aᵀ and dL/dA = scale · Bᵀ dL/dW, row by row of the slices."""
    model, merged = adapted(), adapted()
    merge_adapters(merged)
    for one in (model, merged):
        one.loss(IDS[:, :-1], IDS[:, 1:])[0].backward()
    layer = model.blocks[1].sublayers["attention"].qkv_proj
    weight = merged.blocks[1].sublayers["attention"].qkv_proj.weight
    for name, (_, rows) in list(ROWS.items())[:3]:
        a, b = layer.lora_a[name], layer.lora_b[name]
        torch.testing.assert_close(b.grad, 2 * weight.grad[rows] @ a.T, rtol=0, atol=FLOAT64)
        torch.testing.assert_close(a.grad, 2 * b.T @ weight.grad[rows], rtol=0, atol=FLOAT64)


def test_checkpointed_blocks_give_the_same_gradients():
    """Also under dropout: what is computed again drops the same."""
    grads = []
    for recompute in (False, True):
        model = adapted(dropout=0.4).train()
        model.checkpoint_blocks = recompute
        torch.manual_seed(3)
        model.loss(IDS[:, :-1], IDS[:, 1:])[0].backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_packed_rows_and_caches():
    model = adapted()
    packed = model(IDS, Tokens.packed([[6, 4]] * 3))
    torch.testing.assert_close(packed[:, 6:], model(IDS[:, 6:]), rtol=0, atol=FLOAT64)
    cache = model.make_cache(3, 10)
    parts = [model(IDS[:, :7], cache=cache), model(IDS[:, 7:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, 1), model(IDS), rtol=0, atol=FLOAT64)


def test_the_state_makes_the_round_trip():
    model, other = adapted(), adapted()
    for p in adapter_state(other).values():
        p.zero_()
    assert not torch.equal(model(IDS), other(IDS))
    load_adapters(other, adapter_state(model))
    assert torch.equal(model(IDS), other(IDS))
    name = "blocks.0.sublayers.attention.qkv_proj.lora_b.k"
    assert adapter_state(model)[name].shape == (8, 3)


def test_dropout_acts_in_training_only():
    model = adapted(dropout=0.5)
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


def test_bfloat16_products_and_weights():
    model = adapted(dtype=torch.float32)
    want = model(IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(IDS).float(), want, rtol=0, atol=0.3)
    model.to(torch.bfloat16)
    assert model(IDS).dtype == torch.bfloat16
    merge_adapters(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_mistakes():
    plain = nn.ModuleList([AttentionConfig(n_heads=2, mask=Causal()).build(8), FFNConfig().build(8)])
    with pytest.raises(ConfigError, match=r"targets: the model has no slice 'gate'; known: down, k, o, q, up, v"):
        add_adapters(plain, LoRAConfig(targets=("q", "gate")))
    model = adapted()
    with pytest.raises(ConfigError, match="the model has adapters already; merge them first"):
        add_adapters(model, LoRAConfig())
    with pytest.raises(ConfigError, match=r"rank=0 must be at least 1"):
        LoRAConfig(rank=0)
    with pytest.raises(ConfigError, match=r"dropout=1\.0 must be at least 0 and below 1"):
        LoRAConfig(dropout=1.0)
    for wrong in ((), ("q", "q")):
        with pytest.raises(ConfigError, match="must name one slice or more, each once; null takes all"):
            LoRAConfig(targets=wrong)
    with pytest.raises(ConfigError, match="targets"):
        LoRAConfig(targets=("qkv",))
