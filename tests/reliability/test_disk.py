"""A disk that is full for a while: training goes on, and what was saved stays."""

import contextlib
import errno
import os
import shutil
import subprocess

import pytest

from qkv.checkpoints import Store
from qkv.errors import FileError
from qkv.training import train
from qkv.training.run import Run
from runs import assert_same_run, at_step, fast, last_manifest, metrics, write_recipe  # noqa: F401 - `fast` is a fixture

pytestmark = pytest.mark.usefixtures("fast")


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("point", ["folder made", "piece written", "renamed"])
def test_a_checkpoint_that_cannot_be_saved(tmp_path, monkeypatch, capsys, point):
    """The disk is full at step 10 only; at 15 all is well again."""
    recipe, run = write_recipe(tmp_path, steps=15), tmp_path / "run"
    assert train(recipe, out=tmp_path / "straight") == 0
    kept, save = [], Store.save

    def filled(self, step, *arguments):
        self._at = lambda now: full() if step == 10 and now == point else None
        return save(self, step, *arguments)

    monkeypatch.setattr(Store, "save", filled)
    at_step(monkeypatch, 11, lambda _: kept.append(Store(run / "checkpoints").latest().step))
    capsys.readouterr()
    assert train(recipe, out=run) == 1
    shown = capsys.readouterr()
    assert kept == [10 if point == "renamed" else 5]
    assert "warning:" in shown.out
    assert "step-00000010: not saved (No space left on device); the ones before are intact" in shown.out
    assert "warning: not all was written; the first reason: " in shown.out
    assert shown.err == ""
    assert_same_run(run, tmp_path / "straight")


@pytest.mark.parametrize("writer", ["log", "add_sample", "plot"])
def test_other_files_that_cannot_be_written(tmp_path, monkeypatch, capsys, writer):
    """One warning, not one for each step."""
    recipe, run = write_recipe(tmp_path, steps=12, sample={"tokens": 2}), tmp_path / "run"
    assert train(recipe, out=tmp_path / "straight") == 0
    monkeypatch.setattr(Run, writer, full)
    capsys.readouterr()
    assert train(recipe, out=run) == 1
    message = f"warning: {run}: not everything is written (No space left on device); free some space\n"
    assert capsys.readouterr().out.count(message) == 1
    assert last_manifest(run) == last_manifest(tmp_path / "straight")


def test_a_disk_that_is_really_full(tmp_path, monkeypatch, capsys):
    """From the sixth step to the twelfth there is no room for anything, the metrics included."""
    recipe, disk = write_recipe(tmp_path, steps=16), tmp_path / "disk"
    assert train(recipe, out=tmp_path / "straight") == 0
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if shutil.which("mount") is None or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root and the right to mount")
    kept = []

    def fill(_):
        with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    def empty(_):
        kept.append(Store(disk / "run" / "checkpoints").latest().step)
        (disk / "filler").unlink()

    at_step(monkeypatch, 7, fill)
    at_step(monkeypatch, 13, empty)
    capsys.readouterr()
    try:
        assert train(recipe, out=disk / "run") == 1
        assert kept == [5]
        assert "(No space left on device)" in capsys.readouterr().out
        assert last_manifest(disk / "run") == last_manifest(tmp_path / "straight")
        steps = [entry["step"] for entry in metrics(disk / "run") if "loss" in entry]
        assert steps[:6] == list(range(1, 7))
        assert steps[-4:] == list(range(13, 17))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    """A file where a folder should be: also for root, who may write anywhere."""
    recipe = write_recipe(tmp_path)
    with pytest.raises(
        FileError, match=r"corpus\.txt/run: cannot be written \(Not a directory\); choose another --out"
    ):
        train(recipe, out=tmp_path / "corpus.txt" / "run")
