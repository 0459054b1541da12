"""Batches with evened numbers of tokens."""

import numpy as np
import pytest

from qkv.data.packing import WINDOW, even_batches

LENGTHS = {
    "equal": np.full(150, 7),
    "pictures": np.random.default_rng(0).integers(64, 257, 3000),
    "texts": np.minimum(np.exp(np.random.default_rng(1).normal(3, 0.8, 2500)).astype(int) + 1, 200),
    "one long": np.array([5000] + [3] * 99),
    "few": np.array([4, 2]),
}


@pytest.mark.parametrize("batch_size", [1, 16, 100, 1500])
@pytest.mark.parametrize("name", LENGTHS)
def test_each_item_is_in_one_batch(name, batch_size):
    lengths = LENGTHS[name]
    batches = even_batches(lengths, batch_size, np.random.default_rng(0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size
    assert len(batches) == -(-len(lengths) // batch_size)


@pytest.mark.parametrize("name", LENGTHS)
def test_no_batch_of_a_window_has_more_tokens_than_another_and_the_longest_item(name):
    lengths = LENGTHS[name][:WINDOW]  # one window
    tokens = [lengths[batch].sum() for batch in even_batches(lengths, 16, np.random.default_rng(0))]
    assert max(tokens) - min(tokens) <= lengths.max()


@pytest.mark.parametrize(("name", "evened", "random"), [("pictures", 1.02, 1.2), ("texts", 1.2, 1.5)])
def test_the_largest_batch_has_little_more_tokens_than_the_mean(name, evened, random):
    """Much less than where items are taken in a random order alone."""
    lengths = LENGTHS[name]
    tokens = [lengths[batch].sum() for batch in even_batches(lengths, 16, np.random.default_rng(0))]
    order = np.random.default_rng(0).permutation(len(lengths))
    others = [lengths[order[at : at + 16]].sum() for at in range(0, len(order) - 15, 16)]
    assert max(tokens) < evened * np.mean(tokens)
    assert max(others) > random * np.mean(others)


def test_the_same_for_the_same_seed_and_batches_differ_otherwise():
    lengths = LENGTHS["texts"]
    a, b, c = (even_batches(lengths, 16, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert {frozenset(x.tolist()) for x in a}.isdisjoint(frozenset(x.tolist()) for x in c)
