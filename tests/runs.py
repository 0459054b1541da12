"""Tiny training runs for the tests: a corpus, a recipe, and ways to stop and compare runs."""

import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from qkv.training import session, train, trainer
from qkv.yaml_files import dump_yaml
from tiny import tiny_config

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "birds", "fly", "over", "old", "grey", "hills")


@pytest.fixture
def fast(monkeypatch, tmp_path):
    """Leave out what takes time and changes no number."""
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "matmul_peak", lambda *_: 1e12)
    monkeypatch.setattr(session.Run, "plot", lambda _: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for matrices this small a second one only waits
    yield
    torch.set_num_threads(threads)


def write_corpus(folder, characters=1500):
    """Words in a random order; an epoch of the recipe below is about 20 batches."""
    choose = random.Random(0)
    text = ""
    while len(text) < characters:
        text += choose.choice(WORDS) + choose.choice("    .\n")
    path = folder / "corpus.txt"
    path.write_text(text)
    return path


def recipe_data(corpus, *, dropout=0.1, layers=1, **changes):
    """A recipe as plain data: 40 steps of a model of width 16."""
    model = tiny_config(layers=layers, weight_dropout=dropout, dropout=dropout).to_dict()
    model["embed"] |= {"vocab_size": None, "dropout": dropout}
    source = {"type": "Files", "path": str(corpus)}
    return {
        "model": model,
        "data": {"source": source, "tokenizer": {"type": "CharacterTokenizer"}, "validation": 0.1},
        "steps": 40,
        "context": 16,
        "batch_size": 4,
        "optimizer": {"lr": 0.01},
        "schedule": {"type": "Cosine", "warmup": 4},
        "precision": "float32",
        "evaluate_every": 10,
        "evaluate_batches": 2,
        "save_every": 5,
    } | changes


def write_recipe(folder, **changes):
    """The recipe in a file, with its corpus."""
    path = folder / "tiny.yaml"
    path.write_text(dump_yaml(recipe_data(write_corpus(folder), **changes)))
    return path


def write_vectors(folder, steps=300, features=5):
    """Slow waves, so that the next vector can be told from the last ones."""
    time = np.arange(steps)[:, None] / 5
    np.save(folder / "waves.npy", np.sin(time + np.arange(features)).astype(np.float32))
    return folder / "waves.npy"


def lengths_of(tokens):
    """How many tokens each document of each row has."""
    return tuple(
        tuple((row == number).sum().item() for number in range(1, int(row.max()) + 1)) for row in tokens.segment
    )


class Killed(BaseException):
    """As sudden as a kill, for code that catches `Exception`."""


def at_step(monkeypatch, step, action):
    """Have `action(trainer)` called when the update of `step` (from 1) begins."""
    update = trainer.Trainer.update

    def patched(self):
        if self.step + 1 == step:
            action(self)
        return update(self)

    monkeypatch.setattr(trainer.Trainer, "update", patched)


def terminate_at(step, recipe, out, *, number=signal.SIGTERM, **arguments):
    """Train, with a real signal during the update of `step`; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, lambda _: signal.raise_signal(number))
        return train(recipe, out=out, **arguments)


def kill_at(step, recipe, out, **arguments):
    """Train, and end with no farewell when the update of `step` begins."""

    def kill(_):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, step, kill)
        with pytest.raises(Killed):
            train(recipe, out=out, **arguments)


def last_manifest(run):
    """Sizes and hashes of all that the newest checkpoint holds: equal where the runs are equal bit for bit."""
    return json.loads((max((run / "checkpoints").glob("step-????????")) / "manifest.json").read_text())


def metrics(run):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(run, other):
    """Weights, optimiser, random numbers and every number of the metrics are the same, to the last bit."""
    assert last_manifest(run) == last_manifest(other)
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def snapshot(folder):
    """Every file below a folder with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start_qkv(*arguments, before="", cwd=None, stdout=subprocess.PIPE, **environment):
    """`qkv ARGUMENTS` as a process of its own, after the Python code `before`."""
    code = f"import sys\nfrom qkv.cli import main\n{before}\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # One thread, as in `fast`: sums must run in the same order here and there.
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=stdout, stderr=subprocess.PIPE, text=True)
