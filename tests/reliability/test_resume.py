"""A run that was stopped and resumed equals one that was not, to the last bit."""

import os
import shutil
import signal

import pytest

from qkv.errors import ConfigError, FileError
from qkv.training import read_recipe, session, train, trainer
from qkv.yaml_files import read_yaml
from runs import (
    assert_same_run,
    fast,  # noqa: F401 - a fixture
    kill_at,
    last_manifest,
    metrics,
    start_qkv,
    terminate_at,
    write_recipe,
)

pytestmark = pytest.mark.usefixtures("fast")

STOPS = (1, 7, 20, 39)
KINDS = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
    "accumulation": {"accumulation": 2},
    "recomputed blocks": {"checkpoint_blocks": True},
    "no dropout, no clip": {"dropout": 0.0, "clip": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_by_signals(tmp_path, kind):
    """At every stop a checkpoint is made of exactly that step."""
    recipe, run = write_recipe(tmp_path, **KINDS[kind]), tmp_path / "stopped"
    assert train(recipe, out=tmp_path / "straight") == 0
    for stop in STOPS:
        assert terminate_at(stop, recipe, run, resume=run.exists()) == 143
        assert last_manifest(run)["step"] == stop
    assert train(recipe, out=run, resume=True) == 0
    assert_same_run(run, tmp_path / "straight")


@pytest.mark.parametrize("kind", KINDS)
def test_killed(tmp_path, kind):
    """What was computed since the last checkpoint (none, 5, 15, 35) is computed again."""
    recipe, run = write_recipe(tmp_path, **KINDS[kind]), tmp_path / "killed"
    assert train(recipe, out=tmp_path / "straight") == 0
    for stop in STOPS:
        kill_at(stop, recipe, run, resume=run.exists())
    assert train(recipe, out=run, resume=True) == 0
    assert_same_run(run, tmp_path / "straight")


def test_several_epochs_pass_in_these_runs(tmp_path):
    recipe = read_recipe(write_recipe(tmp_path))
    task = recipe.data.prepare()
    assert len(trainer.Trainer(recipe.resolved(task), task).batches) * 1.5 < recipe.steps


def test_measuring_the_machine_draws_no_random_numbers(tmp_path, monkeypatch):
    """It happens once in each process, so twice in a resumed run."""
    monkeypatch.undo()
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "cache"))
    recipe, run = write_recipe(tmp_path, steps=6), tmp_path / "run"
    assert train(recipe, out=tmp_path / "straight") == 0
    assert terminate_at(3, recipe, run) == 143
    assert train(recipe, out=run, resume=True) == 0
    assert_same_run(run, tmp_path / "straight")
    assert (run / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("part", ["set_random_state", "load_optimizer"])
def test_the_comparison_notices_a_part_that_is_not_restored(tmp_path, monkeypatch, part):
    recipe, run = write_recipe(tmp_path, steps=12), tmp_path / "run"
    assert train(recipe, out=tmp_path / "straight") == 0
    assert terminate_at(7, recipe, run) == 143
    monkeypatch.setattr(trainer, part, lambda *_: None)
    assert train(recipe, out=run, resume=True) == 0
    assert last_manifest(run) != last_manifest(tmp_path / "straight")


def test_a_process_killed_in_the_middle(tmp_path):
    recipe, run = write_recipe(tmp_path, steps=20), tmp_path / "run"
    assert train(recipe, out=tmp_path / "straight") == 0
    kill = """
import os, signal
from qkv.training import trainer
gradients = trainer.Trainer._gradients
def patched(self, *arguments):
    result = gradients(self, *arguments)
    if self.step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
trainer.Trainer._gradients = patched
"""
    process = start_qkv("train", recipe, "--out", run, before=kill)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -9, errors
    assert [entry["step"] for entry in metrics(run) if "loss" in entry] == list(range(1, 13))
    assert train(recipe, out=run, resume=True) == 0
    assert_same_run(run, tmp_path / "straight")


@pytest.mark.parametrize("point", ["file written", "renamed"])
def test_a_process_killed_while_it_saves(tmp_path, point):
    """Every point on its own is tried in test_store.py; here one before and one after the checkpoint counts."""
    recipe, run = write_recipe(tmp_path, steps=14), tmp_path / "run"
    assert train(recipe, out=tmp_path / "straight") == 0
    kill = f"""
import os, signal
from qkv.checkpoints import Store
save = Store.save
def patched(self, step, *arguments):
    if step == 10:
        self._at = lambda point: point == {point!r} and os.kill(os.getpid(), signal.SIGKILL)
    return save(self, step, *arguments)
Store.save = patched
"""
    process = start_qkv("train", recipe, "--out", run, before=kill)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -9, errors
    assert last_manifest(run)["step"] == {"file written": 5, "renamed": 10}[point]
    assert train(recipe, out=run, resume=True) == 0
    assert_same_run(run, tmp_path / "straight")


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, damage):
    recipe, run = write_recipe(tmp_path, steps=14), tmp_path / "run"
    assert train(recipe, out=tmp_path / "straight") == 0
    assert terminate_at(12, recipe, run) == 143
    path = run / "checkpoints" / "step-00000012" / "optimizer.safetensors"
    if damage == "cut":
        os.truncate(path, 100)
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)
    capsys.readouterr()
    assert train(recipe, out=run, resume=True) == 0
    shown = capsys.readouterr().out
    assert f"warning: {path}: " in shown
    assert f"resumed {run} after step 10\n" in shown
    assert_same_run(run, tmp_path / "straight")


def test_no_whole_checkpoint_is_an_error_and_nothing_is_lost(tmp_path):
    recipe, run = write_recipe(tmp_path, steps=7), tmp_path / "run"
    assert train(recipe, out=run) == 0
    before = (run / "metrics.jsonl").read_bytes()
    for path in (run / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(FileError, match=r"none of its 2 checkpoints is whole"):
        train(recipe, out=run, resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("spoil", ["float", "long", "short", "absent", "noise"])
def test_random_states_of_another_kind_are_refused(tmp_path, monkeypatch, spoil):
    """A whole checkpoint, by its hashes, that PyTorch's generator cannot go back to."""
    recipe, run, state = write_recipe(tmp_path, steps=6), tmp_path / "run", trainer.Trainer.state

    def spoilt(self):
        files, data = state(self)
        good = files["random"]["cpu"]
        bad = {"float": good.float(), "long": good.long(), "short": good[:16], "noise": good.clone().fill_(7)}
        return files | {"random": {"cpu": bad[spoil]} if spoil in bad else {"other": good}}, data

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "state", spoilt)
        assert terminate_at(4, recipe, run) == 143
    before = last_manifest(run)
    with pytest.raises(FileError, match=r"step-00000004: does not fit the recipe \(.*\); resume with its own recipe"):
        train(recipe, out=run, resume=True)
    assert last_manifest(run) == before


def test_a_line_of_metrics_that_a_crash_cut(tmp_path):
    recipe, run = write_recipe(tmp_path, steps=9), tmp_path / "run"
    assert train(recipe, out=tmp_path / "straight") == 0
    kill_at(8, recipe, run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "lo')
    assert train(recipe, out=run, resume=True) == 0
    assert_same_run(run, tmp_path / "straight")


# --- what a run goes on with ----------------------------------------------------------------------------------------


def test_a_runs_own_recipe_repeats_it_from_anywhere(tmp_path, monkeypatch):
    """Also where the recipe gave the corpus by a relative path."""
    recipe, elsewhere = write_recipe(tmp_path), tmp_path / "elsewhere"
    recipe.write_text(recipe.read_text().replace(str(tmp_path / "corpus.txt"), "corpus.txt"))
    assert "path: corpus.txt" in recipe.read_text()
    monkeypatch.chdir(tmp_path)
    assert train(recipe, sets=["precision=auto", "optimizer.lr=0.02"], out=tmp_path / "first") == 0
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert train(tmp_path / "first" / "recipe.yaml") == 0
    assert_same_run(elsewhere / "runs" / "first-1", tmp_path / "first")
    first, second = (
        path.read_text() for path in (tmp_path / "first/recipe.yaml", elsewhere / "runs/first-1/recipe.yaml")
    )
    assert first == second
    assert "lr: 0.02" in first


def test_resume_with_the_runs_recipe_alone(tmp_path):
    recipe, run = write_recipe(tmp_path, steps=12), tmp_path / "run"
    assert train(recipe, out=tmp_path / "straight") == 0
    assert terminate_at(6, recipe, run) == 143
    assert train(run / "recipe.yaml", resume=True) == 0
    assert_same_run(run, tmp_path / "straight")


def test_a_finished_run_can_be_made_longer(tmp_path, capsys):
    recipe, run = write_recipe(tmp_path, steps=6), tmp_path / "run"
    assert train(recipe, out=run) == 0
    assert train(recipe, out=run, resume=True) == 0
    assert "all 6 steps are done; to train on, add --set steps=MORE" in capsys.readouterr().out
    assert train(recipe, sets=["steps=9"], out=run, resume=True) == 0
    assert last_manifest(run)["step"] == 9
    assert read_yaml(run / "recipe.yaml")["steps"] == 9
    assert [entry["step"] for entry in metrics(run) if "loss" in entry] == list(range(1, 10))


def test_another_recipe_is_refused(tmp_path):
    recipe, run = write_recipe(tmp_path, steps=6), tmp_path / "run"
    assert terminate_at(3, recipe, run) == 143
    with pytest.raises(ConfigError, match=r"run/recipe\.yaml says model\.d_model is 16, not 32; a run goes on with"):
        train(recipe, sets=["model.d_model=32"], out=run, resume=True)
    with pytest.raises(ConfigError, match=r"says seed is 0, not 1; a run goes on with"):
        train(recipe, sets=["seed=1"], out=run, resume=True)


def test_another_corpus_is_refused(tmp_path):
    recipe, run = write_recipe(tmp_path, steps=6), tmp_path / "run"
    assert terminate_at(3, recipe, run) == 143
    corpus = tmp_path / "corpus.txt"
    text = corpus.read_text()
    corpus.write_text(text[1] + text[0] + text[2:])  # the same characters, so the same tokenizer and sizes
    with pytest.raises(
        FileError, match=r"was trained on other data than the recipe's source gives now; put the corpus"
    ):
        train(recipe, out=run, resume=True)
    corpus.write_text(text)
    assert train(recipe, out=run, resume=True) == 0


def test_a_run_does_not_go_back(tmp_path):
    recipe, run = write_recipe(tmp_path, steps=6), tmp_path / "run"
    assert train(recipe, out=run) == 0
    before = (run / "recipe.yaml").read_text()
    with pytest.raises(ConfigError, match=r"steps=4 and .*run has done 6; set steps to that or more"):
        train(recipe, sets=["steps=4"], out=run, resume=True)
    assert (run / "recipe.yaml").read_text() == before


def test_resume_needs_a_run(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"--resume needs a run to continue; add --out RUN"):
        train(recipe, resume=True)
    with pytest.raises(FileError, match=r"nowhere is no run: it has no recipe\.yaml; give the folder"):
        train(recipe, out=tmp_path / "nowhere", resume=True)
    mine = recipe.rename(tmp_path / "recipe.yaml")  # of the user, beside the corpus: not that of a run
    with pytest.raises(FileError, match=r"is no run: it has no checkpoints"):
        train(mine, resume=True)


def test_resume_before_the_first_checkpoint(tmp_path):
    recipe, run = write_recipe(tmp_path, steps=8), tmp_path / "run"
    assert train(recipe, out=tmp_path / "straight") == 0
    kill_at(3, recipe, run)
    assert not list((run / "checkpoints").iterdir())
    assert train(recipe, out=run, resume=True) == 0
    assert_same_run(run, tmp_path / "straight")


def test_weights_of_another_model_in_the_run(tmp_path):
    recipe, run, other = write_recipe(tmp_path, steps=6), tmp_path / "run", tmp_path / "other"
    assert train(recipe, out=run) == 0
    assert train(recipe, sets=["model.d_model=32"], out=other) == 0
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    with pytest.raises(FileError, match=r"does not fit the recipe \(.*\); resume with its own recipe"):
        train(recipe, out=run, resume=True)


def test_what_may_change_on_the_way_changes_no_number(tmp_path):
    """Evaluations, samples and checkpoints draw no random numbers of training."""
    recipe = write_recipe(tmp_path, steps=12)
    often = ["evaluate_every=1", "save_every=3", "sample.tokens=5", "sample.temperature=1.0", "keep=1"]
    assert train(recipe, out=tmp_path / "seldom") == 0
    assert train(recipe, sets=often, out=tmp_path / "often") == 0
    files = [last_manifest(tmp_path / name)["files"] for name in ("seldom", "often")]
    assert files[0] == files[1]
    assert (tmp_path / "often" / "samples.txt").read_text().count("--- after step") == 12


def test_interrupted_before_the_first_step(tmp_path, monkeypatch):
    """The signal comes while the machine is measured."""
    recipe, run = write_recipe(tmp_path, steps=5), tmp_path / "run"
    assert train(recipe, out=tmp_path / "straight") == 0
    with monkeypatch.context() as patch:
        patch.setattr(session, "matmul_peak", lambda *_: signal.raise_signal(signal.SIGINT) or 1.0)
        assert train(recipe, out=run) == 130
    assert train(recipe, out=run, resume=True) == 0
    assert_same_run(run, tmp_path / "straight")
