"""Every module has its floor, and libraries that run what a file says, or need not be there, few importers."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qkv

SOURCES = {path: ast.parse(path.read_text()) for path in Path(qkv.__file__).parent.rglob("*.py")}


def importers(library):
    """The modules that import it, at the top or anywhere else."""
    found = set()
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == library for name in names):
                found.add(path.relative_to(Path(qkv.__file__).parent).as_posix())
    return found


@pytest.mark.parametrize(
    ("library", "modules"),
    [
        ("jinja2", {"data/sandbox.py"}),
        (
            "tokenizers",
            {
                "data/gguf_vocabulary.py",
                "data/tokenizer.py",
                "data/tokenizer_configs.py",
                "data/tokenizer_files.py",
            },
        ),
        ("pickle", {"checkpoints/transly.py"}),
        ("h5py", {"checkpoints/transly.py"}),
        ("safetensors", set()),
        ("transformers", {"loading/certificate.py"}),
        ("huggingface_hub", {"loading/names.py"}),
    ],
)
def test_few_modules_import_it(library, modules):
    assert importers(library) == modules


def test_the_reader_of_transly_waits_until_it_is_asked_for():
    code = "import sys, qkv.loading.layouts, qkv.cli; sys.exit('qkv.checkpoints.transly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_module_is_on_a_floor():
    """Import-linter does not look at a module that no layer names."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    (floors,) = project["tool"]["importlinter"]["contracts"]
    named = [name for layer in floors["layers"] for name in re.findall(r"qkv\.(\w+)", layer)]
    there = {path.relative_to(Path(qkv.__file__).parent).parts[0].removesuffix(".py") for path in SOURCES}
    assert sorted(named) == sorted(there - {"__init__"})
