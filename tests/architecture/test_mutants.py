"""The list of planted faults fits the library: a fault that cannot be planted finds no hole in the suite."""

from pathlib import Path

from mutants import MUTANTS, ROOT


def test_every_fault_can_be_planted():
    texts = {mutant.file: (ROOT / "src/qkv" / mutant.file).read_text(encoding="utf-8") for mutant in MUTANTS}
    stale = [f"{mutant.name}: {mutant.file}" for mutant in MUTANTS if mutant.old not in texts[mutant.file]]
    assert not stale, f"fix tests/mutants.py: {stale}"


def test_the_tests_that_ought_to_find_them_exist():
    files = {mutant.tests.split("::")[0] for mutant in MUTANTS}
    assert [name for name in sorted(files) if not Path(ROOT, name).exists()] == []
