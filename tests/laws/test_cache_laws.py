"""The laws of caches: rings, chunks, ragged rows, rollback and new orders of rows change no answer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv import CrossAttentionConfig, Memory, PreNormConfig, RMSNormConfig
from qkv.caches import Dense, Ring
from qkv.errors import ConfigError
from qkv.masks import Causal, Chunked, Full, Strided, Window
from qkv.models.stack import Repeat
from qkv.tokens import Tokens
from tiny import tiny_config, tiny_model, token_ids
from tolerances import FLOAT64

MASKS = [
    Causal() & Window(size=3),
    Causal() & Window(size=1),
    Causal() & Chunked(size=4),
    Causal() & (Window(size=2) | Chunked(size=5)),
    Causal() & (Strided(stride=3) | Window(size=2)),
    Causal(),
]


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.describe())
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_reading_in_pieces_equals_reading_at_once(mask, data):
    """Laws 4, 17, 18, 27: prompts longer than the window, pieces of any length, ragged rows."""
    model, n = tiny_model(mask=mask), 17
    lengths = data.draw(st.lists(st.integers(1, n), min_size=1, max_size=3))
    ids = token_ids(len(lengths), n)
    cache = model.make_cache(len(lengths), 3 * n, room=data.draw(st.sampled_from([None, 1, 5])))
    done = [0] * len(lengths)
    with torch.no_grad():
        while any(d < m for d, m in zip(done, lengths, strict=True)):
            pieces = [min(m - d, data.draw(st.integers(0, 7))) for d, m in zip(done, lengths, strict=True)]
            width = max(pieces)
            if not width or cache.bound + width > cache.capacity:
                pieces = [min(m - d, 1) for d, m in zip(done, lengths, strict=True)]
                width = 1
            inputs = torch.zeros(len(lengths), width, dtype=torch.long)
            for row, (d, p) in enumerate(zip(done, pieces, strict=True)):
                inputs[row, :p] = ids[row, d : d + p]
            got = model(inputs, Tokens.padded(pieces, width), cache=cache)
            for row, (d, p) in enumerate(zip(done, pieces, strict=True)):
                if p:
                    close(got[row, :p], model(ids[row : row + 1, : d + p])[0, d:])
            done = [d + p for d, p in zip(done, pieces, strict=True)]
    assert cache.length.tolist() == lengths


def test_a_window_keeps_a_ring_and_its_memory_does_not_grow():
    """Decoding: the memory is that of the window, whatever is generated."""
    model = tiny_model(mask=Causal() & Window(size=4))
    sizes = [model.make_cache(2, capacity).n_bytes for capacity in (10, 100, 100_000)]
    assert sizes[0] == sizes[1] == sizes[2]
    cache, ids = model.make_cache(1, 100_000), token_ids(1, 40)
    with torch.no_grad():
        steps = torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(40)], 1)
        close(steps, model(ids))
    assert cache.n_bytes == sizes[0] // 2
    assert isinstance(cache._storages[4], Ring)
    assert isinstance(model.make_cache(1, 4)._storages[4], Dense)  # no ring larger than the text


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.describe())
def test_rollback(mask):
    """Tokens that were taken back leave no trace, again and again."""
    model, ids, other = tiny_model(mask=mask), token_ids(2, 30), token_ids(2, 30, seed=9)
    cache = model.make_cache(2, 40, rollback=3)
    with torch.no_grad():
        want = model(ids)
        model(ids[:, :11], cache=cache)
        for start in range(11, 29, 2):
            model(other[:, start : start + 3], cache=cache)
            cache.rollback(3)
            got = model(ids[:, start : start + 2], cache=cache)
            close(got, want[:, start : start + 2])
            cache.rollback(1)
            close(model(ids[:, start + 1 : start + 2], cache=cache)[:, 0], want[:, start + 1])


def test_a_rollback_that_is_too_long():
    model, ids = tiny_model(mask=Causal() & Window(size=4)), token_ids(1, 20)
    cache = model.make_cache(1, 40, rollback=2)
    model(ids[:, :10], cache=cache)
    with pytest.raises(ConfigError, match=r"rollback of 3 tokens.*keeps 2 to spare.*rollback=3"):
        cache.rollback(3)
    cache.rollback(2)
    with pytest.raises(ConfigError, match="rollback=3"):  # the two before are gone already
        cache.rollback(1)
    with pytest.raises(ConfigError, match="shortest row holds 8"):
        cache.rollback(9)


@pytest.mark.parametrize("room", [None, 8, 2])
@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(size=3)], ids=["dense", "ring"])
def test_reorder(mask, room):
    """Law 25's other half: the rows of beams move, and their caches with them."""
    model = tiny_model(mask=mask)
    ids, last = token_ids(3, 8), token_ids(4, 1, seed=5)
    cache, rows = model.make_cache(3, 12, room=room), torch.tensor([2, 0, 2, 1])
    with torch.no_grad():
        model(ids, Tokens.padded([8, 5, 7]), cache=cache)
        cache.reorder(rows)
        got = model(last, cache=cache)[:, 0]
        for i, row in enumerate(rows.tolist()):
            text = torch.cat([ids[row : row + 1, : [8, 5, 7][row]], last[i : i + 1]], 1)
            close(got[i], model(text)[0, -1])


def test_room_is_made_as_tokens_come():
    model = tiny_model(mask=Causal())
    whole, cache = model.make_cache(2, 64), model.make_cache(2, 64, room=4)
    sizes = []
    with torch.no_grad():
        for token in token_ids(2, 64).unbind(1):
            close(model(token[:, None], cache=cache), model(token[:, None], cache=whole))
            sizes.append(cache.n_bytes)
        assert sizes[0] == sizes[3] < sizes[4] == sizes[7] < sizes[8]
        assert cache.n_bytes == whole.n_bytes
        with pytest.raises(ConfigError, match="the cache has room for 64 tokens: 64 tokens are held and 1 are to come"):
            model(token[:, None], cache=cache)


def cross_model():
    norm, mask = RMSNormConfig(), Causal()
    config = tiny_config(mask=mask)
    attention, ffn = config.blocks.pattern.sublayers
    cross = CrossAttentionConfig(n_heads=4, n_kv_heads=2, mask=Full(), memory_dim=10)
    block = PreNormConfig(norm=norm, sublayers=(attention, cross, ffn))
    import dataclasses

    return tiny_model(config=dataclasses.replace(config, blocks=Repeat(n=2, pattern=block)))


def test_cross_attention_is_computed_once_and_changes_nothing():
    """Law 26: ragged memories, while decoding."""
    model, ids = cross_model(), token_ids(2, 7)
    vectors = torch.randn(2, 9, 10, dtype=torch.float64)
    memory = Memory(vectors, Tokens.padded([9, 4]))
    calls = []
    for block in model.blocks:
        block.sublayers["cross_attention"].kv_proj.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        want = model(ids, memory=memory)
        assert len(calls) == 2
        cache = model.make_cache(2, 7)
        got = torch.cat([model(ids[:, i : i + 1], cache=cache, memory=memory) for i in range(7)], 1)
        assert len(calls) == 4
        close(got, want)
        close(want[1:], model(ids[1:], memory=Memory(vectors[1:, :4], Tokens.full(1, 4))))
    with pytest.raises(ConfigError, match="reads a memory and was given none"):
        model(ids)
    with pytest.raises(ConfigError, match="memory is 3 wide and cross-attention takes 10"):
        model(ids, memory=Memory(vectors[..., :3], memory.tokens))
