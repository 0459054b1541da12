"""The run folder: everything a run leaves behind."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO, final

from qkv.checkpoints import Store
from qkv.config import dump_yaml, read_yaml
from qkv.data import Tokenizer
from qkv.errors import ConfigError, FileError
from qkv.training.recipe import RecipeConfig

RECIPE, METRICS, CHECKPOINTS = "recipe.yaml", "metrics.jsonl", "checkpoints"


@final
class Run:
    """A run folder.

    It holds `recipe.yaml` (resolved: it repeats the run), `tokenizer.json`, `metrics.jsonl` (a line for each step and
    evaluation), `loss.png`, `samples.txt` and `checkpoints/`.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self.store = Store(path / CHECKPOINTS, keep=keep)
        self._metrics: TextIO | None = None

    @staticmethod
    def create(path: Path, recipe: RecipeConfig, tokenizer: Tokenizer | None) -> "Run":
        """A new run folder.

        Raises:
            ConfigError: The folder has something in it.
            FileError: It cannot be written.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"{path} exists and is not empty; add --resume to go on with it, or choose another --out")
        try:
            path.mkdir(parents=True, exist_ok=True)
            if tokenizer is not None:
                tokenizer.save(path)
            partial = path / f"{RECIPE}.partial"  # the recipe comes last, and whole: it makes the folder a run
            partial.write_text(dump_yaml(recipe.to_dict()), encoding="utf-8")
            partial.rename(path / RECIPE)
        except OSError as error:
            raise FileError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
        return Run(path, recipe.keep)

    @staticmethod
    def saved_recipe(path: Path) -> RecipeConfig:
        """The resolved recipe of a run folder.

        Raises:
            FileError: The folder is no run.
        """
        if not (path / RECIPE).is_file():
            raise FileError(f"{path} is no run: it has no {RECIPE}; give the --out of an earlier `qkv train`")
        try:
            return RecipeConfig.from_dict(read_yaml(path / RECIPE))
        except ConfigError as error:
            raise FileError(f"{path / RECIPE}: {error}") from None

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps after `step`, which a resumed run computes again, and a half-written last line."""
        path = self.path / METRICS
        if not path.exists():
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        partial = path.with_name(f"{METRICS}.partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(path)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Add a line to `metrics.jsonl`."""
        if self._metrics is None:
            self._metrics = (self.path / METRICS).open("a", encoding="utf-8", buffering=1)
        self._metrics.write(json.dumps(entry) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`."""
        path = self.path / METRICS
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def add_sample(self, step: int, text: str) -> None:
        """Add a text to `samples.txt`."""
        with (self.path / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- after step {step} ---\n{text}\n\n")

    def plot(self) -> bool:
        """Draw `loss.png`; returns whether there is a library to draw with."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return False
        entries = self.metrics()
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for key, label, style in (("loss", "training", "-"), ("validation_loss", "held out", "o-")):
            points = [(entry["step"], entry[key]) for entry in entries if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=3)
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=self.path.name)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(self.path / "loss.png", dpi=120)
        return True

    def close(self) -> None:
        """Close `metrics.jsonl`."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def default_out(recipe: Path) -> Path:
    """The first free folder `runs/<name of the recipe>-<number>`."""
    stem = recipe.parent.name if recipe.name == RECIPE else recipe.stem
    number = 1
    while (out := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return out


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
