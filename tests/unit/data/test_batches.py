import itertools
import random
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv.data import IGNORE, Batch, PackedBatches, Split
from qkv.errors import ConfigError
from runs import lengths_of


def split(lengths: list[int]) -> Split:
    """Documents of so many tokens; every token is another number, from 1 on."""
    return Split(np.arange(1, sum(lengths) + 1, dtype=np.uint16), np.cumsum([0, *lengths]), sum(lengths))


def pairs(batch: Batch) -> list[tuple[int, int]]:
    """All (input, target) that are not padding; what is padding is checked."""
    found = []
    for inputs, targets, lengths in zip(
        batch.inputs.tolist(), batch.targets.tolist(), lengths_of(batch.tokens), strict=True
    ):
        n = sum(lengths)
        assert min(lengths) > 0
        assert set(inputs[n:]) <= {0}
        assert set(targets[n:]) <= {IGNORE}
        found += zip(inputs[:n], targets[:n], strict=True)
    return found


def pieces(batch: Batch) -> list[list[int]]:
    found = []
    for inputs, lengths in zip(batch.inputs.tolist(), lengths_of(batch.tokens), strict=True):
        ends = list(itertools.accumulate(lengths, initial=0))
        found += [inputs[begin:end] for begin, end in itertools.pairwise(ends)]
    return found


def expected(lengths: list[int]) -> Counter[tuple[int, int]]:
    ends = list(itertools.accumulate(lengths, initial=0))
    return Counter((i, i + 1) for begin, end in itertools.pairwise(ends) for i in range(begin + 1, end))


documents = st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > 1)


def test_a_batch_by_hand() -> None:
    batches = PackedBatches(split([7, 3, 2]), context=4, batch_size=4, seed=0, shuffle=False)
    batch = batches.batch(0, 0)
    assert len(batches) == 1
    assert batch.inputs.tolist() == [[1, 2, 3, 4], [5, 6, 8, 9], [11, 0, 0, 0]]
    assert batch.targets.tolist() == [[2, 3, 4, 5], [6, 7, 9, 10], [12, IGNORE, IGNORE, IGNORE]]
    assert lengths_of(batch.tokens) == ((4,), (2, 2), (1,))
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64


@settings(deadline=None)
@given(documents, st.integers(1, 16), st.integers(1, 5), st.integers(0, 3))
def test_validation_has_every_target_once(lengths: list[int], context: int, batch_size: int, epoch: int) -> None:
    batches = PackedBatches(split(lengths), context=context, batch_size=batch_size, seed=0, shuffle=False)
    found = [batches.batch(epoch, i) for i in range(len(batches))]
    assert Counter(pair for batch in found for pair in pairs(batch)) == expected(lengths)
    assert all(batch.inputs.shape == (batch_size, context) for batch in found[:-1])
    assert 1 <= len(found[-1].inputs) <= batch_size


@settings(deadline=None)
@given(documents, st.integers(1, 16), st.integers(0, 9), st.integers(0, 9))
def test_an_epoch_of_training_has_every_target_once(lengths: list[int], context: int, seed: int, epoch: int) -> None:
    # One batch with room for every row: nothing is left out.
    batches = PackedBatches(split(lengths), context=context, batch_size=sum(lengths), seed=seed, shuffle=True)
    assert len(batches) == 1
    batch = batches.batch(epoch, 0)
    assert Counter(pairs(batch)) == expected(lengths)
    assert batch.inputs.shape[1] == context
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for piece in pieces(batch):
        assert piece == list(range(piece[0], piece[0] + len(piece)))
        assert owner[piece[0] - 1] == owner[piece[-1] - 1]


@settings(deadline=None)
@given(documents, st.integers(1, 16), st.integers(1, 5), st.integers(0, 9))
def test_batches_of_training_are_full_and_repeat_nothing(
    lengths: list[int], context: int, batch_size: int, seed: int
) -> None:
    batches = PackedBatches(split(lengths), context=context, batch_size=batch_size, seed=seed, shuffle=True)
    for epoch in range(3):
        found = [batches.batch(epoch, i) for i in range(len(batches))]
        assert len(found) == 1 or all(len(batch.inputs) == batch_size for batch in found)
        assert max(Counter(pair for batch in found for pair in pairs(batch)).values()) == 1


@settings(deadline=None, max_examples=30)
@given(documents, st.integers(1, 16), st.integers(0, 9))
def test_a_batch_depends_on_nothing_but_seed_epoch_and_index(lengths: list[int], context: int, seed: int) -> None:
    def fresh() -> PackedBatches:
        return PackedBatches(split(lengths), context=context, batch_size=2, seed=seed, shuffle=True)

    places = [(epoch, index) for epoch in range(3) for index in range(len(fresh()))]
    shuffled = random.Random(0).sample(places, len(places))
    one = fresh()
    in_disorder = {place: one.batch(*place) for place in shuffled}
    for place in places:
        a, b = in_disorder[place], fresh().batch(*place)
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)
        assert lengths_of(a.tokens) == lengths_of(b.tokens)


def test_epochs_and_seeds_differ() -> None:
    def first(seed: int, epoch: int) -> list[list[int]]:
        batches = PackedBatches(split([400]), context=16, batch_size=4, seed=seed, shuffle=True)
        return sorted(pieces(batches.batch(epoch, 0)))

    assert len({str(first(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    assert first(1, 2) == first(1, 2)


def test_every_epoch_has_another_order_and_other_neighbours() -> None:
    batches = PackedBatches(split([9] * 20 + [5] * 20), context=8, batch_size=1, seed=0, shuffle=True)
    first_rows = [tuple(batches.batch(epoch, 0).inputs.tolist()[0]) for epoch in range(20)]
    assert len({len(lengths_of(batches.batch(epoch, 0).tokens)[0]) for epoch in range(20)}) == 2
    assert len(set(first_rows)) > 10
    short = {frozenset(map(tuple, pieces(batches.batch(epoch, i)))) for epoch in range(20) for i in range(30)}
    assert len([row for row in short if len(row) == 2]) > 50  # of 190 pairs; 10 if neighbours were always the same


def test_documents_are_cut_at_many_places_but_short_ones_never() -> None:
    batches = PackedBatches(split([200, 9]), context=16, batch_size=100, seed=0, shuffle=True)
    begins = Counter(piece[0] for epoch in range(200) for piece in pieces(batches.batch(epoch, 0)))
    assert {begin for begin in begins if begin > 200} == {201}
    assert len([begin for begin in begins if 1 < begin < 200]) > 190


def test_short_documents_leave_little_padding() -> None:
    random_lengths = np.random.default_rng(0).integers(10, 200, 2000)
    data = Split(np.zeros(random_lengths.sum(), np.uint16), np.concatenate([[0], np.cumsum(random_lengths)]), 0)
    batches = PackedBatches(data, context=256, batch_size=16, seed=0, shuffle=True)
    made = [batches.batch(1, i).tokens for i in range(len(batches))]
    assert sum(tokens.valid.sum().item() for tokens in made) / sum(tokens.valid.numel() for tokens in made) > 0.98


def test_the_last_batch() -> None:
    data = split([8 * 5 + 1])  # five rows
    assert [len(PackedBatches(data, context=8, batch_size=2, seed=0, shuffle=s)) for s in (True, False)] == [2, 3]
    assert [len(PackedBatches(data, context=8, batch_size=9, seed=0, shuffle=s)) for s in (True, False)] == [1, 1]


def test_vectors() -> None:
    values = np.arange(10, dtype=np.float32).reshape(5, 2)
    batches = PackedBatches(Split(values, np.array([0, 3, 5]), None), context=4, batch_size=1, seed=0, shuffle=False)
    batch = batches.batch(0, 0)
    assert batch.inputs.tolist() == [[[0, 1], [2, 3], [6, 7], [0, 0]]]
    assert batch.targets.tolist() == [[[2, 3], [4, 5], [8, 9], [0, 0]]]
    assert lengths_of(batch.tokens) == ((2, 1),)
    assert batch.inputs.dtype == batch.targets.dtype == torch.float32


@pytest.mark.parametrize(("field", "value", "least"), [("context", 0, 1), ("batch_size", 0, 1), ("seed", -1, 0)])
def test_sizes_have_bounds(field: str, value: int, least: int) -> None:
    settings = {"context": 4, "batch_size": 4, "seed": 0} | {field: value}
    with pytest.raises(ConfigError, match=f"{field}={value} must be at least {least}"):
        PackedBatches(split([9]), shuffle=True, **settings)


def test_nothing_to_predict() -> None:
    with pytest.raises(ConfigError, match="the split of 2 documents has nothing to predict"):
        PackedBatches(split([1, 1]), context=4, batch_size=1, seed=0, shuffle=False)


def test_there_are_only_so_many_batches() -> None:
    batches = PackedBatches(split([9]), context=4, batch_size=1, seed=0, shuffle=True)
    for epoch, index in ((0, 2), (0, -1), (-1, 0)):
        with pytest.raises(IndexError, match="there are 2 batches in an epoch"):
            batches.batch(epoch, index)


def test_planning_is_fast() -> None:
    # Ten million tokens; measured 0.03 s. A Python step for each of the 100 000 pieces would exceed the bound.
    lengths = np.random.default_rng(0).geometric(1 / 100, 100_000) + 2
    data = Split(np.zeros(lengths.sum(), np.uint16), np.concatenate([[0], np.cumsum(lengths)]), 0)
    start = time.process_time()
    batches = PackedBatches(data, context=256, batch_size=16, seed=0, shuffle=True)
    batches.batch(0, 0)
    assert time.process_time() - start < 1
