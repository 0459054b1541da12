"""Masked tokens: which are drawn, what becomes of them, and that it is the same each time."""

import math

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from qkv.data import IGNORE, BPETokenizerConfig, CharacterTokenizerConfig, PackedBatches, Split, Tokenizer, with_mask
from qkv.data.masked import MaskedBatches, Masking
from qkv.errors import ConfigError
from runs import lengths_of

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "."]
FIRST, LAST, MASK = 2, 3, 4


@pytest.fixture(scope="module")
def words():
    inner = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.BertProcessing(("[SEP]", LAST), ("[CLS]", FIRST))
    inner.add_special_tokens(WORDS[:5])
    return Tokenizer(inner)


def split(*documents):
    return Split(np.concatenate(documents).astype(np.uint16), np.cumsum([0, *map(len, documents)]), None)


def random_split(*lengths, low=5):
    random = np.random.default_rng(0)
    return split(*(random.integers(low, len(WORDS), n) for n in lengths))


def sizes(**changes):
    return {"context": 16, "batch_size": 4, "seed": 0, "shuffle": True} | changes


def test_each_piece_stands_in_its_frame():
    documents = split([11, 12, 13, 14, 15], [21, 22], [31])
    settings = sizes(context=5, batch_size=9, shuffle=False)
    batch = PackedBatches(documents, shift=0, frame=((FIRST,), (LAST,)), **settings).batch(0, 0)
    assert batch.inputs.tolist() == [[2, 11, 12, 13, 3], [2, 14, 15, 3, 0], [2, 21, 22, 3, 0], [2, 31, 3, 0, 0]]
    assert batch.targets.tolist()[1] == [IGNORE, 14, 15, IGNORE, IGNORE]
    assert lengths_of(batch.tokens) == ((5,), (4,), (4,), (3,))
    with pytest.raises(ConfigError, match="context=2 leaves no room between 2 special tokens"):
        PackedBatches(documents, frame=((FIRST,), (LAST,)), **settings | {"context": 2})


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(3, 16), st.integers(0, 3), st.booleans())
def test_in_an_epoch_each_token_stands_in_one_frame(lengths, context, epoch, shuffle):
    documents = split(np.arange(5, sum(lengths) + 5))  # every token is another number
    documents = Split(documents.values, np.cumsum([0, *lengths]), None)
    settings = sizes(context=context, batch_size=sum(lengths), shuffle=shuffle)
    batch = PackedBatches(documents, shift=0, frame=((FIRST,), (LAST,)), **settings).batch(epoch, 0)
    found = []
    for row, segments in zip(batch.inputs, batch.tokens.segment, strict=True):
        for number in range(1, int(segments.max()) + 1):
            first, *own, last = row[segments == number].tolist()
            assert (first, last) == (FIRST, LAST)
            assert own == list(range(own[0], own[0] + len(own)))
            found += own
    assert sorted(found) == list(range(5, sum(lengths) + 5))


def test_of_all_tokens_15_percent_are_guessed_and_80_10_10_of_these_are_hidden_changed_kept(words):
    documents = random_split(*[500] * 40)
    batches = MaskedBatches(documents, words, Masking(), **sizes(context=102, batch_size=200))
    batch = batches.batch(0, 0)
    plain = PackedBatches(documents, shift=0, frame=words.frame, **sizes(context=102, batch_size=200)).batch(0, 0)
    meant, n = batch.targets != IGNORE, int((plain.targets != IGNORE).sum())
    assert abs(int(meant.sum()) - 0.15 * n) <= 1
    assert n > 19_000
    given, wanted = batch.inputs[meant], batch.targets[meant]
    counts = {"hidden": (given == MASK), "changed": (given != MASK) & (given != wanted), "kept": given == wanted}
    share = 1 / 7  # one of the seven words, which a changed token may be as well
    for name, p in (("hidden", 0.8), ("changed", 0.1 * (1 - share)), ("kept", 0.1 + 0.1 * share)):
        spread = 4 * math.sqrt(len(given) * p * (1 - p))
        assert abs(int(counts[name].sum()) - p * len(given)) < spread, name
    assert given.min() == MASK  # no special token is put there
    assert torch.equal(batch.inputs[~meant], plain.inputs[~meant])
    assert torch.equal(wanted, plain.targets[meant])


@pytest.mark.parametrize(("masking", "given"), [((0.5, 1.0, 0.0), {MASK}), ((0.5, 0.0, 0.0), set(range(5, 12)))])
def test_shares_are_settings(words, masking, given):
    batch = MaskedBatches(random_split(60), words, Masking(*masking), **sizes(batch_size=9)).batch(0, 0)
    meant = batch.targets != IGNORE
    assert int(meant.sum()) in (28, 30)  # the last row may be left out
    assert set(batch.inputs[meant].tolist()) == given


def test_special_tokens_and_padding_are_never_guessed(words):
    documents = random_split(30, 3, 9, low=0)  # also [UNK], and what a text never gives
    batches = MaskedBatches(documents, words, Masking(share=0.99), **sizes())
    for epoch in range(3):
        batch = batches.batch(epoch, 0)
        meant = batch.targets != IGNORE
        assert batch.targets[meant].min() >= 5
        assert not meant[~batch.tokens.valid].any()


def test_few_tokens_have_a_target_all_the_same_and_none_none(words):
    assert int((MaskedBatches(random_split(2), words, Masking(), **sizes()).batch(0, 0).targets != IGNORE).sum()) == 1
    documents = split([1, 1], [5] * 14, [5] * 14)
    batches = MaskedBatches(documents, words, Masking(), **sizes(batch_size=1, shuffle=False))
    assert [int((batches.batch(0, i).targets != IGNORE).sum()) for i in range(3)] == [2, 2, 0]
    with pytest.raises(ConfigError, match="all tokens of the texts are special ones"):
        MaskedBatches(split([1, 1, 1]), words, Masking(), **sizes())


def test_a_batch_is_a_function_of_seed_epoch_and_index(words):
    def fresh(**changes):
        return MaskedBatches(random_split(300, 40), words, Masking(), **sizes(**changes))

    def same(a, b):
        return torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)

    one = fresh()
    assert len(one) > 2
    before = [one.batch(epoch, i) for epoch in range(2) for i in range(len(one))]
    assert same(fresh().batch(1, 1), before[len(one) + 1])
    assert same(one.batch(0, 0), before[0])
    assert not same(before[0], before[len(one)])
    assert not torch.equal(fresh(seed=1).batch(0, 0).targets, before[0].targets)
    one = MaskedBatches(random_split(14), words, Masking(share=0.5), **sizes())  # always the same row
    assert not torch.equal(one.batch(0, 0).targets, one.batch(1, 0).targets)
    out = fresh(shuffle=False)
    assert same(out.batch(5, 1), fresh(shuffle=False, seed=7).batch(0, 1))  # evaluations compare
    assert not torch.equal(out.batch(0, 0).targets == IGNORE, out.batch(0, 1).targets == IGNORE)


def test_a_tokenizer_is_given_a_mask_and_a_frame(words):
    plain = CharacterTokenizerConfig().train(["the cat"])
    made = with_mask(plain)
    assert (plain.mask, plain.frame) == (None, ((), ()))
    assert made.encode("the cat") == plain.encode("the cat")
    assert [made.name_of(i) for i in (*made.frame[0], made.mask, *made.frame[1])] == ["[CLS]", "[MASK]", "[SEP]"]
    assert made.vocab_size == plain.vocab_size + 3
    assert made.special >= {made.mask, made.frame[0][0], made.frame[1][0]}
    (framed,) = made.encode_framed(["t[MASK]e"], special=True)
    assert made.decode(framed.ids) == "te"
    assert framed.ids.count(made.mask) == 1
    assert with_mask(made) is made
    assert with_mask(words) is words
    assert (words.mask, words.frame) == (MASK, ((FIRST,), (LAST,)))


def test_a_mask_takes_the_place_of_the_space_that_words_begin_with():
    texts = ["the cat sat on the mat"] * 9
    made = with_mask(BPETokenizerConfig(vocab_size=270).train(texts))
    (framed,) = made.encode_framed(["the [MASK] sat"], special=True)
    assert framed.ids == [*made.frame[0], *made.encode("the"), made.mask, *made.encode(" sat"), *made.frame[1]]
    (framed,) = with_mask(CharacterTokenizerConfig().train(texts)).encode_framed(["e [MASK]at"], special=True)
    assert len(framed.ids) == 7  # of characters a space is one


def test_a_frame_that_is_there_stays():
    inner = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "the": 1, "</s>": 2}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    made = with_mask(Tokenizer(inner))
    assert (made.frame, made.mask, made.vocab_size) == (((), (2,)), 3, 4)
