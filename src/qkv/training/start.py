"""How a run begins, or goes on: from a recipe to a run folder, resumable bit for bit."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qkv.errors import ConfigError
from qkv.loading.layouts import load_plain
from qkv.models.model import Model
from qkv.tasks import Start, Task
from qkv.training.display import Display
from qkv.training.memory import keep_pages
from qkv.training.recipe import RecipeConfig
from qkv.training.recipe_files import read_recipe
from qkv.training.run import RECIPE, Run, default_out, require_free
from qkv.training.session import Session
from qkv.training.trainer import Trainer
from qkv.yaml_files import expand_home

RESUMABLE = frozenset({"steps", "evaluate_every", "evaluate_batches", "save_every", "keep", "sample", "non_finite"})
"""What may be changed when a run goes on: it does not change what the steps so far have computed."""


def train(
    recipe: Path | Mapping[str, Any], *, sets: Sequence[str] = (), out: Path | None = None, resume: bool = False
) -> int:
    """Train as a recipe says; the whole of `qkv train`.

    Args:
        recipe: A YAML file, or a run folder's own `recipe.yaml`, which repeats that run; or what would stand in one.
        sets: Changes such as `"optimizer.lr=3e-4"`.
        out: The run folder; None: the next free one under `runs/`.
        resume: Go on with the run in `out` from its last whole checkpoint.

    Returns:
        The exit code: 0; 143, 130 or 129 after SIGTERM, SIGINT or SIGHUP; 1 where not all could be written on the way.

    Raises:
        ConfigError: The recipe, a change or a combination is wrong. Nothing was written.
        FileError: The corpus, or the run to resume, cannot be read.
        TrainingError: The loss is not finite. The weights before that step are saved.
    """
    config = read_recipe(recipe, sets)
    keep_pages()
    path, file = out and expand_home(out), recipe if isinstance(recipe, Path) else Path("run")
    if resume:
        path = path or (file.parent if file.name == RECIPE else None)
        if path is None:
            raise ConfigError("--resume needs a run to continue; add --out RUN, or give RUN/recipe.yaml as the recipe")
        saved = Run.saved_recipe(path)
    else:
        path, saved = path or default_out(file), None
        require_free(path)  # before minutes of work on the corpus
    with contextlib.closing(Display(str(path))) as display:
        begin = _begin(config, path, display) if saved is None else _resume(config, saved, path, display)
        return begin.run_to_end()


def _begin(config: RecipeConfig, path: Path, display: Display) -> Session:
    trainer = Trainer(*_open(config, display))
    if config.precision == "auto":
        display.doing("timing float32 and bfloat16")
    note = trainer.choose_precision()
    session = Session(trainer, Run.create(path, trainer.recipe, trainer.task), display)
    if note is not None:
        display.say(note)
    return session


def _open(config: RecipeConfig, display: Display, run: Path | None = None) -> tuple[RecipeConfig, Task, Model | None]:
    """The resolved recipe, its task, and what it starts from: `run`, or its own start."""
    for note in config.data.notes():
        display.say(note)
    display.doing("reading the data")
    if config.start is None:
        task = config.data.prepare()
        return config.resolved(task), task, None
    path = config.start.path if run is None else str(run)
    base = load_plain(path, display.say)
    task = config.data.prepare(Start(path, base))
    return config.resolved(task, base.model.config), task, base.model


def _resume(config: RecipeConfig, saved: RecipeConfig, path: Path, display: Display) -> Session:
    if config.precision == "auto":  # it was chosen when the run began
        config = dataclasses.replace(config, precision=saved.precision)
    run = Run(path, config.keep)
    checkpoint = run.store.latest()
    config, task, base = _open(config, display, path if checkpoint is not None and config.data.keeps_start else None)
    for key, new in config.to_dict().items():
        if key not in RESUMABLE and (found := difference(saved.to_dict()[key], new, key)):
            raise ConfigError(
                f"{path / RECIPE} says {found}; a run goes on with the recipe it began with: give that one, or begin a "
                "new run"
            )
    trainer = Trainer(config, task, base)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if trainer.step > config.steps:
        raise ConfigError(f"steps={config.steps} and {path} has done {trainer.step}; set steps to that or more")
    run.forget_after(trainer.step)
    run.save_recipe(config)
    losses = [entry["validation_loss"] for entry in run.metrics() if "validation_loss" in entry]
    trainer.validation = losses[-1] if losses else None
    for warning in checkpoint.warnings if checkpoint else ():
        display.say(f"warning: {warning}")
    display.say(f"resumed {path} after step {trainer.step}")
    if trainer.step >= config.steps:
        display.say(f"all {config.steps} steps are done; to train on, add --set steps=MORE")
    return Session(trainer, run, display)


def difference(old: Any, new: Any, path: str) -> str | None:
    """The first place where two pieces of plain data differ, as `a.b is 1, not 2`; None: they are equal."""
    if old == new:
        return None
    before, after = (dict(enumerate(value)) if isinstance(value, list) else value for value in (old, new))
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        return next(filter(None, (difference(before[key], after[key], f"{path}.{key}") for key in before)))
    return f"{path} is {old!r}, not {new!r}"
