"""A weight is a function of the seed and of its name: not of what was drawn before it, nor of what else there is."""

import dataclasses

import pytest
import torch
from torch import nn

from qkv import InitConfig, LearnedGridConfig, PatchEmbedderConfig, RecurrentConfig, preset
from tiny import tiny_model

EACH = InitConfig(std=0.5, scale_residual=False)


def built(config, seed=0):
    torch.manual_seed(seed)
    return dict(config.build().named_parameters())


def stack(*kinds):
    plain = tiny_model().config
    blocks = plain.blocks if isinstance(plain.blocks, tuple) else (plain.blocks,)
    block = blocks[0].pattern if hasattr(blocks[0], "pattern") else blocks[0]
    assert not isinstance(block, tuple)
    made = tuple(dataclasses.replace(block, sublayers=(*block.sublayers, *more)) for more in kinds)
    return dataclasses.replace(plain, blocks=made, init=EACH)


def test_a_weight_does_not_depend_on_the_others():
    some = (RecurrentConfig(),)  # with vectors that are drawn, too
    few, many = built(stack((), some)), built(stack(some, some, ()))
    assert few.keys() < many.keys()
    assert all(torch.equal(p, many[name]) for name, p in few.items())
    again = built(stack(some, some, ()))
    assert all(torch.equal(p, many[name]) for name, p in again.items())


def test_another_seed_and_the_next_model_have_other_weights():
    config = stack(())
    torch.manual_seed(0)
    first, second = (dict(config.build().named_parameters()) for _ in range(2))
    for other in (second, built(config, seed=1)):
        assert all(not torch.equal(p, other[name]) for name, p in first.items() if p.dim() > 1)
    names = [name for name, p in first.items() if p.dim() > 1]
    assert len({tuple(first[name].flatten()[:4].tolist()) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["translator", "bahdanau"])
def test_models_of_pairs_too(name):
    config = preset(name).with_vocabularies(11, 12, shared=False)
    first = built(config)
    torch.manual_seed(0)
    with torch.device("meta"):
        config.build()  # has no weights to draw, and draws no number
    second = dict(config.build().named_parameters())
    assert all(torch.equal(p, second[key]) for key, p in first.items())
    drawn = [key for key, p in first.items() if p.unique().numel() > 1]
    assert len({tuple(first[key].flatten()[:3].tolist()) for key in drawn}) == len(drawn)


def test_weights_are_drawn_anew():
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters() if p.dim() > 1}
    model.reset_parameters()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.dim() > 1)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 64, 32))
        self.mix = nn.Conv1d(32, 64, 4)


def test_the_inputs_of_a_weight_with_three_axes():
    experts = Experts()
    InitConfig(std=None).apply(experts, [], 1, seed=0)
    # 8,192 draws or more: the deviation is known to 0.8 %.
    assert experts.weight.std().item() == pytest.approx(32**-0.5, rel=0.03)  # each expert maps 32 numbers to 64
    assert experts.mix.weight.std().item() == pytest.approx((32 * 4) ** -0.5, rel=0.03)


def test_the_map_of_an_embedder_is_no_table():
    embed = PatchEmbedderConfig(patch=8, channels=3, prefix=64, position=LearnedGridConfig(rows=8, columns=8)).build(64)
    InitConfig(std=None, embed_std=0.5).apply(embed, [], 1, seed=0)
    # of 4,096 draws or more the deviation is known to 1.1 %
    assert embed.proj.weight.std().item() == pytest.approx(192**-0.5, rel=0.05)
    for table in (embed.prefix, embed.position.weight):
        assert table.std().item() == pytest.approx(0.5, rel=0.05)


def test_a_type_of_sixteen_bits_has_the_same_weights_rounded():
    wide, narrow = nn.Linear(5, 3), nn.Linear(5, 3, dtype=torch.bfloat16)
    for model in (wide, narrow):
        InitConfig().apply(model, [], 1, seed=7)
    assert torch.equal(narrow.weight, wide.weight.bfloat16())
