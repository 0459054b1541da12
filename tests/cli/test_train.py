"""`qkv train` end to end: a run that the other verbs read, a resume, a terminal."""

import json
import os
import sys

import pytest

from qkv.cli import main
from qkv.yaml_files import read_yaml
from runs import assert_same_run, fast, metrics, start_qkv, write_recipe  # noqa: F401 - `fast` is a fixture

pytestmark = pytest.mark.usefixtures("fast")


def test_train_then_eval_and_generate(tmp_path, capsys):
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    assert main(["train", str(recipe), "--out", str(run), "--set", "steps=8", "--set", "optimizer.lr=3e-3"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "step 8/8  loss " in shown.out
    assert "trained 8 steps in 0:0" in shown.out
    saved = read_yaml(run / "recipe.yaml")
    assert (saved["steps"], saved["optimizer"]["lr"]) == (8, 3e-3)
    assert main(["eval", str(run), str(tmp_path / "corpus.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == (tmp_path / "corpus.txt").stat().st_size
    assert 1 < found["loss"] < 4
    assert main(["generate", str(run), "the ", "--max-new-tokens", "8", "--seed", "0"]) == 0
    assert capsys.readouterr().out.startswith("the ")


def test_resume(tmp_path):
    recipe, run = str(write_recipe(tmp_path, steps=8, schedule={"type": "WSD", "decay": 0.0})), tmp_path / "run"
    assert main(["train", recipe, "--out", str(tmp_path / "straight")]) == 0
    assert main(["train", recipe, "--out", str(run), "--set", "steps=5", "--set", "evaluate_batches=2"]) == 0
    assert main(["train", recipe, "--out", str(run), "--resume"]) == 0
    losses = [
        [entry["loss"] for entry in metrics(folder) if "loss" in entry] for folder in (run, tmp_path / "straight")
    ]
    assert losses[0] == losses[1]
    assert read_yaml(run / "recipe.yaml")["steps"] == 8


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_a_terminal_shows_a_panel_and_gets_its_cursor_back(tmp_path):
    import pty

    leader, follower = pty.openpty()
    recipe, run = write_recipe(tmp_path, steps=12), tmp_path / "run"
    process = start_qkv("train", recipe, "--out", run, stdout=follower, COLUMNS="100", TERM="xterm-256color")
    os.close(follower)
    shown = b""
    try:
        while piece := os.read(leader, 1 << 16):
            shown += piece
    except OSError:  # on Linux this is the end
        pass
    os.close(leader)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    text = shown.decode()
    assert "of matmul peak" in text
    assert "12 / 12" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "trained 12 steps in 0:0" in text[text.rindex("╯") :]
