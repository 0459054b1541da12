"""Recurrent and convolutional sublayers in a stack: the same laws as attention, and a cache that carries a state."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import qkv
from qkv.errors import ConfigError
from qkv.laws import assert_laws
from qkv.nn.blocks import PreNormConfig
from qkv.nn.convolution import ConvolutionConfig
from qkv.nn.recurrent import LSTMConfig, RecurrentConfig
from qkv.tokens import Tokens
from tiny import NORM, tiny_config, tiny_model, token_ids
from tolerances import FLOAT64

SUBLAYERS = {
    "gru": (RecurrentConfig(),),
    "lstm deep": (RecurrentConfig(cell=LSTMConfig(), layers=2, d_hidden=5),),
    "convolution": (ConvolutionConfig(width=3),),
    "of one token": (ConvolutionConfig(width=1),),
    "with attention": (RecurrentConfig(), *tiny_config().blocks.pattern.sublayers, ConvolutionConfig()),
}


def make(name):
    block = PreNormConfig(norm=NORM, sublayers=SUBLAYERS[name])
    config = tiny_config()
    return tiny_model(config=dataclasses.replace(config, blocks=dataclasses.replace(config.blocks, pattern=block)))


@pytest.mark.parametrize("name", SUBLAYERS)
def test_the_laws_hold(name):
    assert_laws(make(name))


@pytest.mark.parametrize("name", SUBLAYERS)
def test_ragged_prompts_go_on_with_a_cache(name):
    model, ids = make(name), token_ids(3, 9)
    lengths = [5, 2, 7]
    prompt = Tokens.padded(lengths, 7, side="left")
    placed = torch.zeros(3, 7, dtype=torch.long)
    for row, n in enumerate(lengths):
        placed[row, 7 - n :] = ids[row, :n]
    cache = model.make_cache(3, 12)
    model(placed, prompt, cache=cache)
    rows = torch.tensor([2, 0, 2])
    cache.reorder(rows)
    new = torch.stack([ids[row, lengths[row]] for row in rows.tolist()])
    out = model(new[:, None], cache=cache)[:, 0]
    for got, row in zip(out, rows.tolist(), strict=True):
        want = model(ids[row : row + 1, : lengths[row] + 1])[0, -1]
        torch.testing.assert_close(got, want, rtol=0, atol=FLOAT64)
    with pytest.raises(ConfigError, match="whose past cannot be taken back"):
        cache.rollback(1)


def test_a_convolution_is_its_equation():
    torch.manual_seed(0)
    layer = ConvolutionConfig(width=3).build(4).double()
    x = torch.randn(1, 6, 4).double()
    update, aux = layer(x)
    assert aux is None
    for t in range(6):
        seen = [x[0, t - 2 + i] if t - 2 + i >= 0 else torch.zeros(4).double() for i in range(3)]
        both = layer.conv.bias + sum(layer.conv.weight[:, :, i] @ seen[i] for i in range(3))
        want = layer.o_proj.weight @ (both[:4] * torch.sigmoid(both[4:]))
        torch.testing.assert_close(update[0, t], want, rtol=0, atol=FLOAT64)


def test_it_trains_and_writes():
    config = qkv.TransformerConfig(
        d_model=8,
        embed=qkv.TokenEmbedderConfig(vocab_size=5),
        blocks=PreNormConfig(norm=NORM, sublayers=(RecurrentConfig(), ConvolutionConfig())),
        head=qkv.LMHeadConfig(),
    )
    torch.manual_seed(0)
    model = config.build()
    ids = (torch.arange(40) + torch.arange(5)[:, None]) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(60):
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    greedy = qkv.SamplingConfig(temperature=0)
    steps = qkv.generate(model, [[0, 1, 2], [3]], max_new_tokens=4, sampling=greedy)
    assert [step.ids for step in steps] == [(3, 4), (4, 0), (0, 1), (1, 2)]
    assert loss < F.cross_entropy(torch.zeros(1, 5), torch.tensor([0])) / 4


def test_mistakes():
    with pytest.raises(ConfigError, match=r"width=0 must be at least 1"):
        ConvolutionConfig(width=0)
    with pytest.raises(ConfigError, match=r"layers=0 must be at least 1"):
        RecurrentConfig(layers=0)
