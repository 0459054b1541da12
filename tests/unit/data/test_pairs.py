"""Corpora of pairs: sources, what is held out, and batches that are a function of (seed, epoch, index)."""

import collections
import re

import numpy as np
import pytest
import torch

from qkv.data import (
    BPETokenizerConfig,
    CharacterTokenizerConfig,
    DatesConfig,
    PairBatches,
    TSVConfig,
    WordTokenizerConfig,
)
from qkv.errors import ConfigError, FileError
from qkv.tasks import PairDataConfig
from runs import lengths_of

CHARACTERS, WORDS = CharacterTokenizerConfig(), WordTokenizerConfig()


def write(folder, n=40):
    path = folder / "pairs.tsv"
    path.write_text("".join(f"{'abc' * (i % 4 + 1)}{i}\t{' '.join(str(i))} x\tcomment\n" for i in range(n)))
    return path


def data(folder, **changes):
    return PairDataConfig(
        source=TSVConfig(path=str(write(folder))), tokenizer=CHARACTERS, target_tokenizer=WORDS, **changes
    )


def source_lengths(batch):
    return [n for (n,) in lengths_of(batch.inputs.tokens)]


def test_pairs_of_a_file(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_bytes("\ufeffun\tone\tCC\r\n\r\ndeux \ttwo\r\n".encode())
    assert list(TSVConfig(path=str(path)).pairs()) == [("un", "one"), ("deux", "two")]
    assert list(TSVConfig(path=str(path), columns=(1, 0)).pairs())[1] == ("two", "deux")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\nc\n", r"columns=\[0, 1\] are asked for, from 0; each line needs a tab"),
        ("a\t \n", "pair 1: one side is empty"),
    ],
)
def test_broken_files(tmp_path, text, message):
    (tmp_path / "p.tsv").write_text(text)
    with pytest.raises(FileError, match=message):
        list(TSVConfig(path=str(tmp_path / "p.tsv")).pairs())
    with pytest.raises(FileError, match="no such file"):
        list(TSVConfig(path=str(tmp_path / "q.tsv")).pairs())


def test_a_source_is_never_in_both_parts(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_text("".join(f"s{i % 30}\tt{i}\n" for i in range(90)))
    config = PairDataConfig(source=TSVConfig(path=str(path)), tokenizer=CHARACTERS, validation=0.3)
    train, out = config.divided()
    assert len(train) == 21
    assert len(out) == 9
    assert not {s for s, _ in train} & {s for s, _ in out}
    assert config.divided() == (train, out)


def test_pairs_of_a_file_are_held_out_and_not_trained_on(tmp_path):
    (tmp_path / "p.tsv").write_text("a\tb\nc\td\ne\tf\n")
    (tmp_path / "out.tsv").write_text("c\tx\ng\th\n")
    config = PairDataConfig(
        source=TSVConfig(path=str(tmp_path / "p.tsv")), tokenizer=CHARACTERS, validation=str(tmp_path / "out.tsv")
    )
    assert config.divided() == ([("a", "b"), ("e", "f")], [("c", "x"), ("g", "h")])
    assert config.prepare().validation.n_documents == 2
    (tmp_path / "p.tsv").write_text("c\td\n")
    with pytest.raises(FileError, match=r"out\.tsv: has 2 sources, and 0 are left to train on"):
        config.divided()


def test_a_batch_is_what_the_pairs_say(tmp_path):
    dataset = data(tmp_path, validation=0.2).prepare()
    source, target = dataset.tokenizer.source, dataset.tokenizer.target
    pairs = set(data(tmp_path).source.pairs())
    seen = []
    batches = PairBatches(dataset.train, context=20, batch_size=5, seed=3, shuffle=True)
    for i in range(len(batches)):
        batch = batches.batch(2, i)
        read, written = batch.inputs.source, batch.inputs.target
        for row, (n, (m,)) in enumerate(zip(source_lengths(batch), lengths_of(batch.tokens), strict=True)):
            text = source.decode(read[row, :n].tolist())
            answer = target.decode(batch.targets[row, : m - 1].tolist())
            assert (text, answer) in pairs
            seen.append(text)
            assert written[row, 0] == batch.targets[row, m - 1] == target.end_of_text
            assert torch.equal(written[row, 1:m], batch.targets[row, : m - 1])
            assert (read[row, n:] == 0).all()
            assert source.end_of_text not in read[row, :n]
            assert (batch.targets[row, m:] == -100).all()
    assert len(set(seen)) == len(seen) == 30  # 32 pairs in batches of 5


def test_order_depends_on_seed_and_epoch_alone(tmp_path):
    train = data(tmp_path).prepare().train

    def rows(seed, epoch, index):
        return PairBatches(train, context=20, batch_size=4, seed=seed, shuffle=True).batch(epoch, index).inputs.source

    batches = PairBatches(train, context=20, batch_size=4, seed=0, shuffle=True)
    assert torch.equal(batches.batch(5, 1).inputs.source, rows(0, 5, 1))
    assert torch.equal(batches.batch(0, 1).inputs.source, rows(0, 0, 1))
    others = [rows(0, 1, 1), rows(1, 0, 1)]
    assert not any(x.shape == rows(0, 0, 1).shape and torch.equal(x, rows(0, 0, 1)) for x in others)


def test_held_out_batches_leave_nothing_out_and_are_sorted(tmp_path):
    split = data(tmp_path, validation=0.5).prepare().validation
    batches = PairBatches(split, context=20, batch_size=6, seed=0, shuffle=False)
    lengths = [n for i in range(len(batches)) for n in source_lengths(batches.batch(9, i))]
    assert len(lengths) == 20
    assert lengths == sorted(lengths)
    with pytest.raises(IndexError):
        batches.batch(0, len(batches))


def test_what_is_too_long(tmp_path):
    train = data(tmp_path).prepare().train
    with pytest.raises(
        ConfigError, match="context=9 and the longest pair has 14 tokens on one side; raise context to 14"
    ):
        PairBatches(train, context=9, batch_size=4, seed=0, shuffle=True)
    short = data(tmp_path, longest=9).prepare().train
    assert short.n_documents < train.n_documents
    assert np.diff(short.source.offsets).max() - 2 <= 9
    PairBatches(short, context=9, batch_size=4, seed=0, shuffle=True)
    with pytest.raises(FileError, match="has at most longest=1 tokens"):
        data(tmp_path, longest=1).prepare()


def test_one_tokenizer_or_two(tmp_path):
    two = data(tmp_path).prepare().tokenizer
    assert not two.shared
    one = PairDataConfig(source=TSVConfig(path=str(write(tmp_path))), tokenizer=BPETokenizerConfig(vocab_size=260))
    one = one.prepare().tokenizer
    assert one.shared
    assert one.source.vocab_size == 260
    one.save(tmp_path)
    assert (tmp_path / "source" / "tokenizer.json").read_text() == (tmp_path / "target" / "tokenizer.json").read_text()


def test_words():
    tokenizer = WORDS.train(["HH EH1 L OW0", "EH1"])
    assert tokenizer.decode(tokenizer.encode("L  EH1\tHH")) == "L EH1 HH"
    assert tokenizer.vocab_size == 5
    with pytest.raises(ConfigError, match="the word 'EH2' is not in the corpus"):
        tokenizer.encode("L EH2")


def test_mistakes(tmp_path):
    with pytest.raises(ConfigError, match=r"validation=0.0 must be above 0 .* and a path takes the pairs of a file"):
        data(tmp_path, validation=0)
    with pytest.raises(ConfigError, match="validation=1"):
        data(tmp_path, validation=1.0)
    with pytest.raises(ConfigError, match="two different numbers"):
        TSVConfig(path="x", columns=(1, 1))
    (tmp_path / "one.tsv").write_text("a\tb\na\tc\n")
    with pytest.raises(FileError, match="has 1 different sources"):
        PairDataConfig(source=TSVConfig(path=str(tmp_path / "one.tsv")), tokenizer=CHARACTERS).divided()


# --- dates ----------------------------------------------------------------------------------------------------------


def test_dates_name_one_date_each():
    pytest.importorskip("babel")
    pairs = list(DatesConfig(n=3000).pairs())
    assert pairs == list(DatesConfig(n=3000).pairs())
    assert pairs != list(DatesConfig(n=3000, seed=1).pairs())
    assert len({source for source, _ in pairs}) == 3000
    for source, target in pairs:
        year, month, day = target.split("-")
        numbers = [int(n) for n in re.findall(r"\d+", source)]
        assert sorted(numbers) == sorted([int(year), int(day)]), (source, target)  # the month is a word
        assert 1950 <= int(year) <= 2049
        assert 1 <= int(month) <= 12


def test_no_text_means_two_dates_whatever_the_locale():
    """All texts of a year, in all locales and formats."""
    import datetime

    pytest.importorskip("babel")
    from qkv.data.dates import LOCALES, _formats

    meant = collections.defaultdict(set)
    for pattern, locale in _formats(LOCALES):
        for n in range(365):
            date = datetime.date(2021, 1, 1) + datetime.timedelta(days=n)
            meant[" ".join(pattern.apply(date, locale).split())].add(date)
    assert [text for text, dates in meant.items() if len(dates) > 1] == []


def test_dates_that_cannot_be():
    pytest.importorskip("babel")
    with pytest.raises(ConfigError, match="Babel knows no 'xx_yy'"):
        list(DatesConfig(locales=("xx_yy",)).pairs())
    with pytest.raises(ConfigError, match="lower it"):
        list(DatesConfig(n=10_000, locales=("en",), years=(2000, 2001)).pairs())
    with pytest.raises(ConfigError, match="rise"):
        DatesConfig(years=(2000, 1999))
