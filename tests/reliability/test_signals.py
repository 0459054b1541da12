"""Signals to a real process in the middle of a step."""

import re
import signal
import sys

import pytest

from qkv.training import train
from runs import assert_same_run, fast, last_manifest, start_qkv, write_recipe  # noqa: F401 - `fast` is a fixture

pytestmark = [
    pytest.mark.usefixtures("fast"),
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
]

SLOW_STEP = """
import time, torch
from qkv.training import trainer
gradients = trainer.Trainer._gradients
def patched(self, *arguments):
    if self.step == 6:
        print("COMPUTING", flush=True)
        end = time.monotonic() + {seconds}
        ones = torch.ones(700, 700)
        while time.monotonic() < end:
            ones @ ones
    return gradients(self, *arguments)
trainer.Trainer._gradients = patched
"""


def start_slow(recipe, run, seconds):
    """A run whose seventh step has begun and takes a while."""
    heard = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # whatever started the tests, as nohup does
    process = start_qkv("train", recipe, "--out", run, before=heard + SLOW_STEP.format(seconds=seconds))
    for line in process.stdout:
        if line == "COMPUTING\n":
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_the_step_is_finished_and_saved(tmp_path, number, code):
    recipe, run = write_recipe(tmp_path, steps=12), tmp_path / "my run"
    assert train(recipe, out=tmp_path / "straight") == 0
    process = start_slow(recipe, run, seconds=0.5)
    process.send_signal(number)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == "\nqkv: stopping after this step; a second signal leaves at once\n"
    assert f"stopped by {number.name} after step 7; saved up to step 7 in {run}\n" in shown
    assert last_manifest(run)["step"] == 7
    (command,) = re.findall(r"continue with: qkv (.*)\n", shown)
    assert command == f"train '{run}/recipe.yaml' --resume"
    assert train(run / "recipe.yaml", resume=True) == 0
    assert_same_run(run, tmp_path / "straight")


def test_nohup_is_obeyed(tmp_path):
    recipe, run = write_recipe(tmp_path, steps=12), tmp_path / "run"
    ignored = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = start_qkv("train", recipe, "--out", run, before=ignored + SLOW_STEP.format(seconds=0.5))
    for line in process.stdout:
        if line == "COMPUTING\n":
            process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert last_manifest(run)["step"] == 12


def test_a_second_signal_leaves_at_once(tmp_path):
    recipe, run = write_recipe(tmp_path, steps=12), tmp_path / "run"
    assert train(recipe, out=tmp_path / "straight") == 0
    process = start_slow(recipe, run, seconds=100)
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == "\n"
    assert "a second signal leaves at once" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    shown, errors = process.communicate(timeout=10)
    assert process.returncode == 143
    assert (shown, errors) == ("", "")
    assert last_manifest(run)["step"] == 5
    assert train(recipe, out=run, resume=True) == 0
    assert_same_run(run, tmp_path / "straight")
