"""The run folder: everything a run leaves behind."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from qkv.checkpoints import Store
from qkv.disk import write_whole, writing
from qkv.errors import ConfigError, FileError
from qkv.tasks import Task
from qkv.training.recipe import RecipeConfig
from qkv.yaml_files import dump_yaml, read_yaml

RECIPE, METRICS, CHECKPOINTS, PLOT = "recipe.yaml", "metrics.jsonl", "checkpoints", "loss.png"


@final
class Run:
    """A run folder.

    It holds `recipe.yaml` (resolved: it repeats the run), what the task saves (a tokenizer, for example),
    `metrics.jsonl` (a line for each step and evaluation), `loss.png`, `samples.txt` and `checkpoints/`.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.store = Store(path / CHECKPOINTS, keep=keep)

    @staticmethod
    def create(path: Path, recipe: RecipeConfig, task: Task) -> "Run":
        """A new run folder; `ConfigError` where there is something in it."""
        require_free(path)
        with writing(path, "choose another --out"):
            (path / CHECKPOINTS).mkdir(parents=True)
        task.save(path)
        run = Run(path, recipe.keep)
        run.save_recipe(recipe)  # last, and whole: it makes the folder a run
        return run

    @staticmethod
    def saved_recipe(path: Path) -> RecipeConfig:
        """The resolved recipe of a run folder; `FileError` where it is none."""
        for name in (RECIPE, CHECKPOINTS):
            if not (path / name).exists():
                raise FileError(f"{path} is no run: it has no {name}; give the folder that qkv train wrote")
        try:
            return RecipeConfig.from_dict(read_yaml(path / RECIPE))
        except ConfigError as error:
            raise FileError(f"{path / RECIPE}: {error}") from None

    def save_recipe(self, recipe: RecipeConfig) -> None:
        """Write `recipe.yaml`."""
        self._replace(RECIPE, dump_yaml(recipe.to_dict()))

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps after `step`, which a resumed run computes again."""
        kept = [entry for entry in self.metrics() if entry["step"] <= step]
        self._replace(METRICS, "".join(_json_line(entry) for entry in kept))

    def log(self, entry: Mapping[str, Any]) -> None:
        """Add a line to `metrics.jsonl`; a number that is not finite becomes null, for JSON has none."""
        # Opened each time: a line that did not fit on a full disk must not wait in a buffer and come later.
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(_json_line(entry))

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl` that are whole; a crash or a full disk may have cut one."""
        path = self.path / METRICS
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [entry for entry in map(_parse, lines) if entry is not None]

    def _replace(self, name: str, text: str) -> None:
        with writing(self.path / name, "free some space"):
            write_whole(self.path / name, [text.encode("utf-8")])

    def add_sample(self, step: int, text: str) -> None:
        """Add a text to `samples.txt`."""
        with (self.path / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- after step {step} ---\n{text}\n\n")

    def plot(self) -> None:
        """Draw `loss.png`, with what the task measured more than once, if matplotlib is installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        entries = self.metrics()
        lines = {"loss": (("loss", "training", "C0-"), ("validation_loss", "held out", "C1o-"))} | {
            name: ((name, "held out", "C1o-"),) for name in _measured(entries)
        }
        figure = Figure(figsize=(3 + 4 * len(lines), 4), layout="constrained")
        for axes, (name, curves) in zip(figure.subplots(1, len(lines), squeeze=False)[0], lines.items(), strict=True):
            for key, label, style in curves:
                points = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
                axes.plot(
                    [step for step, _ in points], [value for _, value in points], style, label=label, markersize=3
                )
            axes.set(xlabel="step", ylabel=name.replace("_", " "))
            axes.grid(alpha=0.3)
            axes.legend()
        figure.suptitle(self.path.name)
        figure.savefig(self.path / PLOT, dpi=120)


def _measured(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What two evaluations or more measured beside the loss."""
    found = Counter(key for entry in entries if "validation_loss" in entry for key, x in entry.items() if x is not None)
    return [key for key, n in found.items() if n > 1 and key not in ("step", "validation_loss") and "aux." not in key]


def require_free(path: Path) -> None:
    """Raise `ConfigError` where there is a file, or a folder with something in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not empty; add --resume to continue it, or choose another --out")


def default_out(recipe: Path) -> Path:
    """The first free folder `runs/<name of the recipe>-<number>`."""
    stem = recipe.parent.name if recipe.name == RECIPE else recipe.stem
    places = (Path("runs") / f"{stem}-{number}" for number in itertools.count(1))
    return next(place for place in places if not place.exists())


def _json_line(entry: Mapping[str, Any]) -> str:
    values = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in entry.items()}
    return json.dumps(values) + "\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None
