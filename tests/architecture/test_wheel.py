"""The wheel installs into an empty environment, and trains there."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RECIPE = """
model: {preset: small, d_model: 32}
data: {source: {type: Files, path: book.txt}, tokenizer: {type: CharacterTokenizer}, validation: 0.2}
steps: 3
context: 16
batch_size: 2
precision: float32
schedule: {type: Cosine, warmup: 1}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"qkv/py.typed", "qkv/recipes/shakespeare.yaml", "qkv/ops/attend.py"} <= set(names)
    assert all(name.startswith(("qkv/", "qkv-")) for name in names)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_trains_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    run = tmp_path / "venv" / "bin"
    install = [run / "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    subprocess.run([*install, "torch"], check=True, capture_output=True)
    subprocess.run([*install, wheel], check=True, capture_output=True)
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times.\n" * 20)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    environment = {"PATH": "/usr/bin:/bin", "QKV_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    for command in (["train", "recipe.yaml", "--out", "run"], ["generate", "run", "It was", "--max-new-tokens", "5"]):
        done = subprocess.run([run / "qkv", *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    assert done.stdout.strip()
