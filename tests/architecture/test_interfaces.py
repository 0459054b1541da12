"""Training, evaluation and the command line know tasks, data and models by their interfaces alone."""

import ast
import importlib
from pathlib import Path

import pytest

import qkv
from qkv.cli import drawing  # noqa: F401 - for the classes that it brings
from qkv.data import Batches
from qkv.models.model import Model, ModelConfig
from qkv.tasks import Task, TaskConfig

ROOT = Path(qkv.__file__).parent
# What draws one stack block by block, and says which kernels run in it, is about that kind of model.
OF_STACKS = {"cli/drawing.py", "cli/kernels.py"}
FILES = [
    path
    for folder in ("training", "cli")
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.relative_to(ROOT).as_posix() not in OF_STACKS
] + [ROOT / "tasks" / name for name in ("task.py", "evaluation.py")]
INTERFACES = (Task, TaskConfig, Batches, Model, ModelConfig)


def below(cls):
    return {cls}.union(*map(below, cls.__subclasses__()))


def kinds():
    """The names of all tasks, their data and models, and of what `qkv.load` hands out for them."""
    importlib.import_module("qkv.training")
    opened = {cls.opens for cls in below(TaskConfig) if hasattr(cls, "opens")}
    return {cls.__name__ for cls in set().union(*map(below, INTERFACES)) | opened}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_kind_is_asked_for(path):
    known = kinds()
    assert {"Transformer", "PairModelConfig", "DataConfig", "Text", "PackedBatches", "Loaded", "Translator"} <= known
    for node in ast.walk(ast.parse(path.read_text())):
        asked = []
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            asked = [part for argument in node.args[1:] for part in ast.walk(argument)]
        if isinstance(node, ast.MatchClass):
            asked = list(ast.walk(node.cls))
        names = {getattr(part, "id", getattr(part, "attr", None)) for part in asked}
        assert not names & known, f"line {node.lineno} asks for {names & known}"
