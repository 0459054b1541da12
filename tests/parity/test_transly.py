"""The trained translators of the package transly: our model gives their answers."""

import os
import pickle
import shutil

import h5py
import numpy as np
import pytest
import torch

import qkv
import transly
from qkv.checkpoints.transly import load_transly
from qkv.errors import ConfigError, FileError
from qkv.generation import BeamConfig
from qkv.models.pairs import Pair
from qkv.tokens import Tokens
from tolerances import FLOAT64

NUMPY = 1e-5
"""Logits of a float32 model against float64, of the largest: scores of some 20 go through a softmax, and each kind of
processor adds up in its own order (up to 1.3e-6 was seen)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return transly.unpack(tmp_path_factory.mktemp("transly"))


WORDS = {
    "en2hi": [("NAMASTE", "नमस्ते"), ("GUJARAT", "गुजरात"), ("AHMADABAD", "अहमदाबाद")],
    "hi2en": [("नमस्ते", "NAMASTE"), ("अहमदाबाद", "AHMADABAD")],
    "cmu": [("HELLO", "HH EH1 L OW0"), ("AACHEN", "AA1 K AH0 N")],
}


@pytest.mark.parametrize("name", WORDS)
def test_the_logits_are_those_of_numpy(folder, name):
    found = load_transly(folder / name)
    rests = found.model.config.encoder.rests
    sources = [[found.source[c] for c in word] for word, _ in WORDS[name]]
    targets = [[found.begin, *range(2, 7 + row)] for row in range(len(sources))]
    there = Tokens.padded([len(s) for s in sources])
    here = Tokens.padded([len(t) for t in targets])
    ids, target = (torch.zeros(t.shape, dtype=torch.long) for t in (there, here))
    for row, (s, t) in enumerate(zip(sources, targets, strict=True)):
        ids[row, : len(s)], target[row, : len(t)] = torch.tensor(s), torch.tensor(t)
    with torch.no_grad():
        logits = found.model(Pair(ids, there, target), here)
        exact = found.model.double()(Pair(ids, there, target), here)
    with h5py.File(folder / name / "model.h5") as file:
        for row, (s, t) in enumerate(zip(sources, targets, strict=True)):
            want = transly.numpy_logits(file, s, t, rests)
            np.testing.assert_allclose(exact[row, : len(t)].numpy(), want, rtol=0, atol=FLOAT64)
            np.testing.assert_allclose(logits[row, : len(t)].numpy(), want, rtol=0, atol=NUMPY * np.abs(want).max())


@pytest.mark.parametrize("name", WORDS)
def test_it_translates(folder, name):
    translator = qkv.load(folder / name)
    assert [translator.translate(word) for word, _ in WORDS[name]] == [want for _, want in WORDS[name]]
    ((best, second),) = translator.translations([WORDS[name][0][0]], search=BeamConfig(beams=2))
    assert best.text == WORDS[name][0][1]
    assert best.score > second.score


def test_the_file_itself_will_do_and_the_alignment_shows_what_was_read(folder):
    translator = qkv.load(folder / "en2hi" / "model.h5")
    found = translator.align("NAMASTE")
    assert found.source[:7] == tuple("NAMASTE")
    assert found.target == (*"नमस्ते", "⏎")
    torch.testing.assert_close(found.weights.sum(1), torch.ones(7))
    assert found.weights[0].argmax() == 0  # न is written while N is read


def test_most_of_what_it_was_trained_on_is_right(folder):
    """148 of 150 with the places that Keras's attention sees, 141 without them."""
    pairs = [(a, b) for a, b in transly.pairs("*/hi2en.csv")[:600:4] if len(a) <= 18]
    translator = qkv.load(folder / "hi2en")
    known = [(a, b) for a, b in pairs if all(c in translator.source._vocabulary for c in a)]
    texts = translator.translations([a for a, _ in known])
    right = sum(found[0].text == b for found, (_, b) in zip(texts, known, strict=True))
    assert right >= 0.95 * len(known)
    assert len(known) > 100


def test_what_it_reads_and_what_it_writes_have_limits_of_their_own(folder):
    reads, writes = qkv.load(folder / "hi2en"), qkv.load(folder / "en2hi")
    assert (reads.facts.longest, reads.facts.longest_target) == (18, 16)
    assert (writes.facts.longest, writes.facts.longest_target) == (16, 18)
    assert len(reads.source.encode("नमस्तेनमस्तेनमस्ते"[:17])) == 17
    assert reads.translate("नमस्तेनमस्तेनमस्ते"[:17])


class Touch:
    """Runs a command when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_of_transly_runs_nothing(tmp_path):
    transly.write_tiny(tmp_path)
    facts = pickle.loads((tmp_path / "config.pkl").read_bytes())
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(facts | {"x": Touch(tmp_path / "ran")}, protocol=2))
    assert load_transly(tmp_path).source == {text: i for i, text in enumerate(transly.TINY["source"])}
    assert not (tmp_path / "ran").exists()


def test_arrays_that_are_not_in_the_file(tmp_path):
    transly.write_tiny(tmp_path)
    with h5py.File(tmp_path / "model.h5", "a") as file:
        file["model_weights"].create_dataset("huge", shape=(1 << 40,), dtype="float32")
    with pytest.raises(FileError, match=r"no model that Keras wrote \(its arrays take \d+ bytes of \d+\)"):
        load_transly(tmp_path)


def test_mistakes(folder, tmp_path):
    translator = qkv.load(folder / "en2hi")
    with pytest.raises(ConfigError, match="the character 'é' is not in the corpus"):
        translator.translate("CAFé")
    with pytest.raises(ConfigError, match="the text is blank"):
        translator.translate(" ")
    with pytest.raises(ConfigError, match="text 2 has 17 tokens and the model takes at most 16"):
        translator.translations(["A", "A" * 17])
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        translator.translations(["A"], batch_size=0)
    whole = folder / "cmu"
    for cut, message in (("config.pkl", "no pickle of plain data"), ("model.h5", "no model that Keras wrote")):
        broken = tmp_path / f"half {cut}"
        shutil.copytree(whole, broken)
        data = (broken / cut).read_bytes()
        (broken / cut).write_bytes(data[: len(data) // 2])
        with pytest.raises(FileError, match=message):
            qkv.load(broken)
    (broken / "config.pkl").unlink()
    shutil.copy(whole / "model.h5", broken)
    with pytest.raises(FileError, match=r"config\.pkl: No such file"):
        qkv.load(broken)
