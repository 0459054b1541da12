"""The zoo of hostile files: one line, exit code 3, a second at most, no traceback, no memory, and nothing written.

Five hundred starts of Python with torch would take half an hour. So one process for each of two cores imports
everything and forks for each case: the child gets a cap on its address space, does what the command line does, and ends
with its exit code. What it used is measured by the system for that process alone, in seconds of computing: what other
processes do in the meantime counts little.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from reliability.zoo import GOOD, PASSES, ZOO

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform != "linux", reason="forks, and reads /proc")

# A second, and as much again: with all cores busy, two threads share what is one core, and each takes twice as long.
SECONDS = 2.0


def listing(folder):
    """All that is there, without following links."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came of each case."""
    root = tmp_path_factory.mktemp("zoo")
    jobs = {}
    for i, (name, case) in enumerate({**ZOO, **{f"good: {name}": case for name, case in GOOD.items()}}.items()):
        folder = root / "cases" / f"{i:03d}"
        folder.mkdir(parents=True)
        case.make(folder)
        jobs[name] = [word.replace("{}", str(folder)) for word in case.command]
    before = listing(root / "cases")
    # One thread in the tokenizers' library and one arena of memory: others would take address space from the cap.
    few = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    home = {"HOME": str(root / "home"), "QKV_CACHE": str(root / "cache"), "COLUMNS": "100"}
    path = os.pathsep.join([str(p) for p in map(os.path.abspath, filter(None, sys.path))])
    made, names, workers = {}, list(jobs), []
    for place in (root / "a", root / "b"):
        place.mkdir()
        half = names[: (len(names) + 1) // 2] if place.name == "a" else names[(len(names) + 1) // 2 :]
        (place / "jobs").write_text(json.dumps({name: jobs[name] for name in half}))
        command = [sys.executable, "-m", "reliability.zoo", place / "jobs", place / "results"]
        workers.append(subprocess.Popen(command, env=os.environ | few | home | {"PYTHONPATH": path}))
    for worker, place in zip(workers, (root / "a", root / "b"), strict=True):
        assert worker.wait() == 0
        made |= json.loads((place / "results").read_text())
    made["written"] = sorted(set(listing(root / "cases")) - set(before))
    made["written"] += [name for name in listing(root) if re.fullmatch(r"[ab]/tried/\d+/.*", name)]
    return made


def assert_passes(found):
    assert found["code"] == 0, found
    assert all(line.startswith("qkv: note: ") for line in found["stderr"].splitlines())


@pytest.mark.parametrize("name", GOOD)
def test_good_ones_pass(results, name):
    """Otherwise the zoo could be refused for what all of it has in common."""
    assert_passes(results[f"good: {name}"])


@pytest.mark.parametrize("name", ZOO)
def test_hostile_ones_are_one_line(results, name):
    """Some do no harm, such as an expression that gives up by itself: these may pass."""
    found, case = results[name], ZOO[name]
    if case.code == PASSES:
        assert_passes(found)
        return
    assert not found["stderr"].startswith("Traceback"), found["stderr"][-3000:]
    assert found["code"] == case.code, found
    lines = found["stderr"].splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("qkv: error: ")
    assert re.search(case.says, lines[0])
    assert len(lines[0]) < 2000
    assert lines[0].isprintable()


def test_none_takes_longer_than_a_second(results):
    """Beyond what a command on a good model takes."""
    usual = min(results[f"good: {name}"]["seconds"] for name in GOOD)
    slow = {name: results[name]["seconds"] for name in ZOO if results[name]["seconds"] > usual + SECONDS}
    assert not slow


def test_nothing_is_written(results):
    """No canary, and no half of what `qkv convert` would have made; but for the copies of models that are good."""
    wanted = [name for name in results["written"] if not re.match(r"\d+-made", name)]
    assert not wanted


def test_there_are_enough():
    kinds = [name.partition(":")[0] for name in ZOO]
    assert len(ZOO) >= 120
    assert min(kinds.count(kind) for kind in set(kinds)) >= 12
