"""A checkpoint is whole or not there: killed at every moment, on full disks, with every byte damaged."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qkv.checkpoints import Checkpoint, Store
from qkv.checkpoints.store import POINTS
from qkv.errors import ConfigError, FileError


def content(value):
    return {"model": {"w": torch.full((3,), value)}, "optimizer": {"m": torch.full((2, 2), -value)}}, {"value": value}


def save(store, step, value=None):
    files, state = content(float(step if value is None else value))
    return store.save(step, files, state)


def assert_whole(checkpoint, step, value=None):
    """The checkpoint is of `step`, and all of it is of one save: the one of `value`."""
    files, state = content(float(step if value is None else value))
    assert checkpoint.step == step
    assert checkpoint.state == state
    assert set(checkpoint.files) == files.keys()
    for name, tensors in files.items():
        found = checkpoint.tensors(name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- in peace -------------------------------------------------------------------------------------------------------


def test_save_and_latest(tmp_path):
    store = Store(tmp_path / "new" / "folder", keep=2)
    assert store.latest() is None
    for step in (0, 5, 10, 100_000_000):
        path = save(store, step)
        assert_whole(store.latest(), step)
        assert store.latest().warnings == ()
        assert_whole(Checkpoint.open(path), step)
    assert names(store.folder) == ["step-00000010", "step-100000000"]
    assert names(path) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def test_floats_of_the_state_come_back_exactly(tmp_path):
    state = {
        "lr": 0.1 + 0.2,
        "best": float("inf"),
        "seed": 2**63,
        "name": "é\ud800",
        "list": [1, None, True, {"a": 5e-324}],
    }
    Store(tmp_path).save(1, {}, state)
    assert Store(tmp_path).latest().state == state


def test_the_same_step_is_replaced(tmp_path):
    store = Store(tmp_path, keep=1)
    save(store, 3, value=1)
    save(store, 3, value=2)
    assert_whole(store.latest(), 3, value=2)
    assert names(tmp_path) == ["step-00000003"]


def test_a_later_checkpoint_is_never_pruned_by_an_earlier_one(tmp_path):
    """Going on from step 1 because 9 is damaged: the save of step 2 must neither remove itself nor 9."""
    store = Store(tmp_path, keep=1)
    save(Store(tmp_path, keep=9), 1)
    save(Store(tmp_path, keep=9), 9)
    save(store, 2)
    assert names(tmp_path) == ["step-00000002", "step-00000009"]


def test_tensors_outlive_their_checkpoint(tmp_path):
    store = Store(tmp_path, keep=1)
    save(store, 1)
    tensors = store.latest().tensors("model")
    save(store, 2)
    assert torch.equal(tensors["w"], torch.ones(3))


def test_wrong_arguments(tmp_path):
    with pytest.raises(ConfigError, match=r"keep=0 would remove the checkpoint just saved; use 1 or more"):
        Store(tmp_path, keep=0)
    with pytest.raises(ConfigError, match=r"step=-1: .* counts from 0"):
        Store(tmp_path).save(-1, {}, {})
    for name in ("../x", "", ".x", "a/b"):
        with pytest.raises(ConfigError, match=r"cannot name a file of a checkpoint"):
            Store(tmp_path).save(1, {name: {}}, {})
    with pytest.raises(ConfigError, match=r"the state to save: some 500002 values in its JSON, .*put what is large"):
        Store(tmp_path).save(1, {}, {"order": [0] * 500_000})
    assert names(tmp_path) == []
    save(Store(tmp_path), 1)
    with pytest.raises(FileError, match=r"has no tensors 'modle'; did you mean 'model'\?"):
        Store(tmp_path).latest().tensors("modle")


@pytest.mark.skipif(sys.platform != "linux", reason="names the synced files through /proc")
def test_all_is_on_the_disk_before_the_rename_and_pruned_only_after(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor):
        events.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    def watched_rename(source, target):
        events.append(f"{Path(source).name} -> {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    store = Store(tmp_path / "run", keep=1)
    save(store, 1)
    events.clear()
    save(store, 2)
    assert [re.sub(r"tmp-\w+", "tmp", event) for event in events] == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
        "step-00000002.tmp",
        "step-00000002.tmp -> step-00000002",
        "run",
        tmp_path.name,
        "step-00000001 -> step-00000001.tmp",
    ]


# --- crashes and full disks -----------------------------------------------------------------------------------------

SITUATIONS = {"first save": (), "next step": ((1, 1),), "same step": ((2, 1),), "third of two": ((0, 0), (1, 1))}


def prepared(folder, situation):
    for step, value in SITUATIONS[situation]:
        save(Store(folder), step, value)
    return folder


def moments(folder, situation):
    """Every call of the seam in a save of step 2, in order."""
    seen = []
    save(Store(prepared(folder, situation), keep=1, at=seen.append), 2, value=7)
    return seen


def assert_old_or_new(folder, situation, renamed):
    """What a failed save of step 2 must leave, and that the next one works."""
    latest = Store(folder, keep=1).latest()
    if renamed:
        assert_whole(latest, 2, value=7)
    elif not SITUATIONS[situation]:
        assert latest is None
    else:
        assert_whole(latest, *SITUATIONS[situation][-1])
    assert latest is None or latest.warnings == ()
    for step in (2, 3):
        save(Store(folder, keep=1), step, value=8)
        assert_whole(Store(folder).latest(), step, value=8)
    assert names(folder) == ["step-00000003"]


KILLER = """
import json, os, sys
from pathlib import Path
import torch
from qkv.checkpoints import Store

def killed(folder, moment):
    calls = iter(range(moment))
    def at(point):
        if next(calls, None) is None:
            os._exit(137)
    value = 7.0
    files = {"model": {"w": torch.full((3,), value)}, "optimizer": {"m": torch.full((2, 2), -value)}}
    Store(Path(folder), keep=1, at=at).save(2, files, {"value": value})
    os._exit(0)

for folder, moment in json.loads(sys.argv[1]):
    if not (pid := os.fork()):
        killed(folder, moment)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 137, (folder, moment)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_save_killed_at_any_moment_leaves_the_old_or_the_new(tmp_path):
    cases = []
    seen = {name: moments(tmp_path / name, name) for name in SITUATIONS}
    assert {point for points in seen.values() for point in points} == set(POINTS)
    for name, points in seen.items():
        for moment in range(len(points)):
            folder = prepared(tmp_path / f"{name} {moment}", name)
            cases.append((name, folder, moment, points.index("renamed") <= moment))
    arguments = json.dumps([(str(folder), moment) for _, folder, moment, _ in cases])
    subprocess.run([sys.executable, "-c", KILLER, arguments], check=True, timeout=120)
    for name, folder, _, renamed in cases:
        assert_old_or_new(folder, name, renamed)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_full_disk_at_any_moment_leaves_the_old_or_the_new(tmp_path, situation):
    points = moments(tmp_path / "dry", situation)
    for moment, point in enumerate(points):
        folder = prepared(tmp_path / str(moment), situation)
        calls = iter(range(moment))

        def full(point, calls=calls):
            if next(calls, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        message = (
            "is saved, but older ones" if point == "older one removed" else r"not saved \(No space left on device\)"
        )
        with pytest.raises(FileError, match=message):
            save(Store(folder, keep=1, at=full), 2, value=7)
        assert not [name for name in names(folder) if "tmp" in name]
        assert_old_or_new(folder, situation, points.index("renamed") <= moment)


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root and the right to mount")
    try:
        store = Store(disk / "run", keep=1)
        save(store, 1)
        with pytest.raises(
            FileError, match=r"step-00000002: not saved \(No space left on device\); the ones before are intact"
        ):
            store.save(2, {"model": {"w": torch.zeros(1 << 20)}}, {})
        assert names(store.folder) == ["step-00000001"]
        assert_whole(store.latest(), 1)
        save(store, 3)
        assert_whole(store.latest(), 3)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"not saved \(Not a directory\)|not saved \(File exists\)"):
        save(Store(tmp_path / "file"), 1)


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    store = Store(tmp_path, keep=2)
    save(store, 1)
    save(store, 2)
    return store


FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


def assert_passed_over(store, message):
    found = store.latest()
    assert_whole(found, 1)
    (warning,) = found.warnings
    assert message in warning
    assert "\n" not in warning


@pytest.mark.parametrize("name", FILES)
def test_a_bit_flipped_anywhere_is_noticed(two, name):
    path = two.folder / "step-00000002" / name
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(FileError):
            Checkpoint.open(path.parent)
    assert_passed_over(two, "step-00000002")
    path.write_bytes(whole)
    assert_whole(two.latest(), 2)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_or_missing(two, name):
    path = two.folder / "step-00000002" / name
    os.truncate(path, path.stat().st_size - 1)
    assert_passed_over(two, name)
    path.write_bytes(b"")
    assert_passed_over(two, name)
    path.unlink()
    assert_passed_over(two, f"{name}: No such file")


def test_a_file_too_many_is_ignored_and_said(two):
    (two.folder / "step-00000002" / "notes\n.txt").write_text("mine")
    found = two.latest()
    assert_whole(found, 2)
    assert found.warnings == (f"{found.path}: ignoring 'notes\\n.txt', which its manifest does not list",)


def test_what_is_no_checkpoint_is_left_alone(two):
    for name in ("best", "step-x", "notes.txt.tmp-1"):
        (two.folder / name).mkdir()
    save(two, 3)
    assert names(two.folder) == ["best", "notes.txt.tmp-1", "step-00000002", "step-00000003", "step-x"]


def test_nothing_whole_is_an_error_not_a_fresh_start(two):
    for step in (1, 2):
        (two.folder / f"step-0000000{step}" / "state.json").unlink()
    with pytest.raises(
        FileError, match=r"none of its 2 checkpoints is whole \(.*step-00000002/state\.json: No such file"
    ):
        two.latest()


SHA = "0" * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "not a manifest of format 1 to 2; use another checkpoint or a newer qkv"),
        ({"step": "2"}, "not a manifest"),
        ({"step": 3}, "is of step 3, but in the folder step-00000002"),
        ({"files": []}, "not a manifest"),
        ({"files": {}}, "not a manifest"),
        ({"files": {"state.json": {}}}, "entry 'state.json' is not a plain file name with size and SHA-256"),
        ({"files": {"state.json": {"bytes": 10**30, "sha256": SHA}}}, f"the manifest says {10**30}"),
        ({"files": {"state.json": {"bytes": -1, "sha256": SHA}}}, "the manifest says -1"),
        ({"files": {"state.json": {"bytes": 14, "sha256": SHA}}}, "its SHA-256 is not the manifest's"),
        ({"files": {"state.json": {}, "../x": {"bytes": 0, "sha256": SHA}}}, "is not a plain file name"),
    ],
)
def test_a_hostile_manifest(two, change, message):
    path = two.folder / "step-00000002" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert_passed_over(two, message)


@pytest.mark.parametrize("name", ["../step-00000001/model.safetensors", "/etc/passwd", "..", "", "a\0b", "a" * 300])
def test_a_hostile_name_in_a_manifest(two, name):
    path = two.folder / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": SHA}
    path.write_text(json.dumps(manifest))
    assert_passed_over(two, "is not a plain file name with size and SHA-256")


def test_a_pipe_in_place_of_a_file(two):
    path = two.folder / "step-00000002" / "state.json"
    path.unlink()
    os.mkfifo(path)
    assert_passed_over(two, "not a regular file")
