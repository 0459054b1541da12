"""Training from Python: `qkv.train`."""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np

from qkv.disk import write_whole
from qkv.errors import ConfigError
from qkv.fetch import cache_dir, caching
from qkv.loading.layouts import load
from qkv.models.model import Model
from qkv.training.recipe import RecipeConfig
from qkv.training.recipe_files import read_recipe_data
from qkv.training.run import RECIPE, Run, default_out
from qkv.training.start import train as run_recipe
from qkv.yaml_files import expand_home


@final
@dataclass(frozen=True)
class Trained:
    """A run in its folder.

    Attributes:
        path: The folder.
        exit_code: 0; that of a signal that ended it; 1 where not all could be written.
    """

    path: Path
    exit_code: int

    @cached_property
    def loaded(self) -> Any:
        """What `qkv.load` makes of the run: the model with what reads and writes its texts."""
        return load(self.path)

    @property
    def model(self) -> Model:
        """The trained model, in evaluation mode."""
        return self.loaded.model

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`: one for each step and evaluation."""
        return Run(self.path, keep=1).metrics()


def train(
    recipe: str | Path | Mapping[str, Any] | RecipeConfig,
    *,
    data: Iterable[Any] | None = None,
    sets: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = False,
) -> Trained:
    """Train as a recipe says, and say how far it is: on a terminal in a panel, elsewhere in lines.

    Args:
        recipe: A YAML file, a recipe that comes with qkv (`"shakespeare"`), a mapping like such a file, or a
            `RecipeConfig`.
        data: What to train on, in place of the recipe's source: texts, conversations (mappings as in a line of JSON
            Lines, or lists of messages), pairs of texts, or arrays (T, features). They are kept in qkv's cache.
        sets: Changes such as `"optimizer.lr=3e-4"`.
        out: The run folder; None: the next free one under `runs/`.
        resume: Go on with the run in `out` from its last whole checkpoint.

    Raises:
        ConfigError: The recipe, a change or a combination is wrong. Nothing was written.
        FileError: The corpus, or the run to resume, cannot be read.
        TrainingError: The loss is not finite. The weights before that step are saved.
    """
    file = Path(recipe) if isinstance(recipe, str | Path) else None
    known = read_recipe_data(Path(recipe) if isinstance(recipe, str | Path) else recipe)
    if data is not None:
        known["data"] = (known.get("data") or {}) | {"source": _kept(list(data))}
    own = file.parent if resume and file is not None and file.name == RECIPE else None
    path = expand_home(out) if out else own or default_out(file or Path("run"))
    return Trained(path, run_recipe(known, sets=sets, out=path, resume=resume))


def _kept(documents: list[Any]) -> dict[str, Any]:
    """The documents in a file of the cache, as the source of a recipe."""
    kinds = {_kind(document) for document in documents}
    if len(kinds) != 1 or None in kinds:
        found = {f"array of {d.dtype}" if isinstance(d, np.ndarray) else type(d).__name__ for d in documents}
        raise ConfigError(
            f"data holds {', '.join(sorted(found)) or 'nothing'}; give only texts, only conversations, only pairs of "
            "texts, or only arrays of floats (T, features)"
        )
    kind, suffix = kinds.pop() or ("", "")
    if kind == "VectorFiles":
        files = [io.BytesIO() for _ in documents]
        for file, document in zip(files, documents, strict=True):
            np.save(file, document)
        contents = [file.getvalue() for file in files]
    elif kind == "TSV":
        if any("\t" in text or "\n" in text for pair in documents for text in pair):
            raise ConfigError("data: a text of a pair holds a tab or a line end; replace it with a space")
        contents = ["".join(f"{source}\t{target}\n" for source, target in documents).encode()]
    else:
        lines = [
            {"text": d} if isinstance(d, str) else d if isinstance(d, Mapping) else {"messages": d} for d in documents
        ]
        contents = ["".join(json.dumps(line) + "\n" for line in lines).encode()]
    folder = cache_dir() / "given" / hashlib.sha256(b"\0".join(contents)).hexdigest()[:32]
    with caching(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(contents):
            write_whole(folder / f"{number:08}{suffix}", [content])
    return {"type": kind, "path": str(folder if kind == "VectorFiles" else folder / f"{0:08}{suffix}")}


def _kind(document: Any) -> tuple[str, str] | None:
    match document:
        case str():
            return "Files", ".jsonl"
        case (str(), str()):
            return "TSV", ".tsv"
        case Mapping() | [Mapping(), *_]:
            return "Conversations", ".jsonl"
        case np.ndarray() if document.dtype.kind == "f":
            return "VectorFiles", ".npy"
    return None
