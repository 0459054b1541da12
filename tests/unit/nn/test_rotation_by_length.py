"""A rotation that depends on the length of a text depends on that text alone, however it is read."""

import pytest
import torch

from qkv.errors import ConfigError
from qkv.nn.positions import DynamicNTKScalingConfig, LongRoPEScalingConfig, NTKScalingConfig, RoPEConfig
from qkv.tokens import Tokens
from tiny import tiny_config, tiny_model
from tolerances import FLOAT64

N = 6
SCALINGS = {
    "longrope": LongRoPEScalingConfig(
        original_length=N, short_factors=(1.0, 1.5), long_factors=(3.0, 9.0), attention_factor=1.2
    ),
    "dynamic": DynamicNTKScalingConfig(factor=4.0, original_length=N),
}


@pytest.fixture(params=SCALINGS)
def model(request):
    position = RoPEConfig(theta=50.0, scaling=SCALINGS[request.param])
    return tiny_model(config=tiny_config(position=position)).eval()


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=FLOAT64)


def texts(*lengths):
    return [torch.randint(0, 41, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


def alone(model, ids):
    """What a whole text gives by itself, whose rotation `test_longrope_by_hand` and the parity tests know."""
    return model(torch.as_tensor(ids)[None])[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_and_packed_rows_are_as_if_alone(model, side):
    rows = texts(2, N, N + 1, 11)
    width = max(map(len, rows))
    place = [slice(width - len(row), width) if side == "left" else slice(len(row)) for row in rows]
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for row, at, target in zip(rows, place, ids, strict=True):
        target[at] = row
    padded = model(ids, Tokens.padded([len(row) for row in rows], width, side=side))
    packed = model(torch.cat(rows)[None], Tokens.packed([[len(row) for row in rows]]))
    at = 0
    for row, where, got in zip(rows, place, padded, strict=True):
        close(got[where], alone(model, row))
        close(packed[0, at : at + len(row)], alone(model, row))
        at += len(row)


def test_texts_are_written_past_the_original_length(model):
    prompts = [row.tolist() for row in texts(2, 5, 9)]
    decoding = model.start(prompts, capacity=16)
    for step in range(6):
        for text, logits in zip(prompts, decoding.logits, strict=True):
            close(logits, alone(model, text)[-1])
        if step == 2:  # rows leave and are joined while others cross
            decoding.leave([1])
            del prompts[1]
            decoding.join(model.start([[7, 8, 9, 1]], capacity=16))
            prompts.append([7, 8, 9, 1])
        new = [(step * 5 + row) % 41 for row in range(len(prompts))]
        prompts = [[*text, one] for text, one in zip(prompts, new, strict=True)]
        decoding.advance(torch.tensor(new))


def test_a_cache_is_refused_when_it_would_go_stale_and_not_before(model):
    (ids,) = texts(N + 1)
    cache = model.make_cache(1, 40)
    close(model(ids[None, :4], cache=cache)[0], alone(model, ids[:4]))
    close(model(ids[None, 4:N], cache=cache)[0], alone(model, ids[:N])[4:])
    with pytest.raises(ConfigError, match=r"grows past a length .* read it whole"):
        model(ids[None, N:], cache=cache)
    cache = model.make_cache(1, 40)
    close(model(ids[None], cache=cache)[0], alone(model, ids))


@pytest.mark.parametrize(
    "scaling", [NTKScalingConfig(factor=2.0), DynamicNTKScalingConfig(factor=2.0, original_length=4)]
)
def test_a_base_that_one_pair_has_no_exponent_for(scaling):
    with pytest.raises(ConfigError, match="Scaling needs more than the 2 rotated coordinates of a head"):
        RoPEConfig(scaling=scaling).width(2)
