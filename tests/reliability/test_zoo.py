"""The zoo of hostile files: one line, exit code 3, a second at most, no traceback, no memory, and nothing written.

Two hundred starts of Python with torch would take ten minutes. So one process imports everything and forks for each
case: the child gets a cap on its address space, does what the command line does, and ends with its exit code. What it
used is measured by the system for that process alone, in seconds of computing: what other processes do in the meantime
counts little.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from reliability.zoo import GOOD, ZOO

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
    (root / "jobs").write_text(json.dumps(jobs))
    # One thread in the tokenizers' library and one arena of memory: others would take address space from the cap.
    few = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    home = {"HOME": str(root / "home"), "QKV_CACHE": str(root / "cache"), "COLUMNS": "100"}
    path = os.pathsep.join([str(p) for p in map(os.path.abspath, filter(None, sys.path))])
    command = [sys.executable, "-m", "reliability.zoo", root / "jobs", root / "results"]
    subprocess.run(command, env=os.environ | few | home | {"PYTHONPATH": path}, check=True)
    made = json.loads((root / "results").read_text())
    made["written"] = sorted(set(listing(root / "cases")) - set(before))
    made["written"] += [name for name in listing(root / "tried") if not re.fullmatch(r"\d+(\.\w+)?", name)]
    return made


@pytest.mark.parametrize("name", GOOD)
def test_good_ones_pass(results, name):
    """Otherwise the zoo could be refused for what all of it has in common."""
    found = results[f"good: {name}"]
    assert (found["code"], found["stderr"]) == (0, "")


@pytest.mark.parametrize("name", ZOO)
def test_hostile_ones_are_one_line(results, name):
    found, case = results[name], ZOO[name]
    assert "Traceback" not in found["stderr"], found["stderr"][-3000:]
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
