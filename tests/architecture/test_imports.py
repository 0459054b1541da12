"""Libraries that run what a file says, or that need not be there, are imported in few modules."""

import ast
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
        ("tokenizers", {"data/tokenizers.py", "data/gguf_vocabulary.py"}),
        ("pickle", set()),
        ("transformers", {"certificate.py"}),
        ("huggingface_hub", {"api.py"}),
    ],
)
def test_few_modules_import_it(library, modules):
    assert importers(library) == modules
