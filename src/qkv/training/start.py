"""How a run begins, or goes on: from a recipe to a run folder, resumable bit for bit."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qkv.api import Loaded, load_language_model
from qkv.config import expand_home
from qkv.data import Dataset, PairDataConfig, PairDataset, PairTokenizer, prepare, prepare_pairs
from qkv.errors import ConfigError
from qkv.nn.quantised import Packed
from qkv.training.memory import keep_pages
from qkv.training.recipe import RecipeConfig, read_recipe
from qkv.training.run import RECIPE, Run, default_out, require_free
from qkv.training.trainer import Trainer
from qkv.translator import Translator, load_translator

RESUMABLE = frozenset({"steps", "evaluate_every", "evaluate_batches", "save_every", "keep", "sample", "non_finite"})
"""What may be changed when a run goes on: it does not change what the steps so far have computed."""


def train(recipe: Path, *, sets: Sequence[str] = (), out: Path | None = None, resume: bool = False) -> int:
    """Train as a recipe says; the whole of `qkv train`.

    Args:
        recipe: A YAML file, or a run folder's own `recipe.yaml`, which repeats that run.
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
    if resume:
        trainer = _resume(config, recipe, out)
    else:
        if out is not None:
            out = expand_home(out)
            require_free(out)  # before minutes of work on the corpus
        trainer = Trainer(*_open(config))
        trainer.choose_precision()
        trainer.open(Run.create(out or default_out(recipe), trainer.recipe, trainer.dataset.tokenizer))
    return trainer.run_to_end()


def _open(config: RecipeConfig) -> tuple[RecipeConfig, Dataset | PairDataset, Loaded | Translator | None]:
    """The resolved recipe, its corpus, and what it starts from."""
    if isinstance(config.data, PairDataConfig):
        if config.start is None:
            pairs = prepare_pairs(config.data)
            return config.resolved(pairs), pairs, None
        translator = load_translator(config.start.path)
        pairs = prepare_pairs(config.data, _tokenizers(translator, config.start.path))
        return config.resolved(pairs, translator.model.config), pairs, translator
    if config.start is None:
        dataset = prepare(config.data)
        return config.resolved(dataset), dataset, None
    base = load_language_model(config.start.path)
    if any(isinstance(part, Packed) for part in base.model.modules()):
        raise ConfigError(
            f"start.path={config.start.path}: its weights are packed, and only plain ones can be trained on; "
            f"`qkv convert {config.start.path} FOLDER --to hf`, and start from FOLDER"
        )
    dataset = prepare(config.data, base.tokenizer)
    return config.resolved(dataset, base.config), dataset, base


def _tokenizers(base: Translator, path: str) -> PairTokenizer:
    """Those of a translator; one object where they are one."""
    if base.begin_id != base.end_id:
        raise ConfigError(
            f"start.path={path}: its targets begin with another token than they end with, and training begins "
            "and ends them with one; start from a run of qkv train"
        )
    return PairTokenizer.of(base.source, base.target)


def _reopen(
    config: RecipeConfig, path: Path, saved: RecipeConfig
) -> tuple[RecipeConfig, Dataset | PairDataset, Loaded | Translator | None]:
    """As `_open`, of a run to go on with. Once one on pairs has a checkpoint, it needs its start no more."""
    if not isinstance(config.data, PairDataConfig) or config.start is None:
        return _open(config)
    if Run(path, config.keep).store.latest() is None:
        return _open(config)
    dataset = prepare_pairs(config.data, PairTokenizer.load(path))
    return config.resolved(dataset, saved.model), dataset, None


def _resume(config: RecipeConfig, recipe: Path, out: Path | None) -> Trainer:
    path = (out and expand_home(out)) or (recipe.parent if recipe.name == RECIPE else None)
    if path is None:
        raise ConfigError("--resume needs the run to go on with; add --out RUN, or give RUN/recipe.yaml as the recipe")
    saved = Run.saved_recipe(path)
    if config.precision == "auto":  # it was chosen when the run began
        config = dataclasses.replace(config, precision=saved.precision)
    config, dataset, base = _reopen(config, path, saved)
    for key, new in config.to_dict().items():
        if key not in RESUMABLE and (found := difference(saved.to_dict()[key], new, key)):
            raise ConfigError(
                f"{path / RECIPE} says {found}; a run goes on with the recipe it began with: give that one, or begin a "
                "new run"
            )
    trainer = Trainer(config, dataset, base)
    run = Run(path, config.keep)
    checkpoint = run.store.latest()
    if checkpoint is not None:
        trainer.restore(checkpoint)
    if trainer.step > config.steps:
        raise ConfigError(f"steps={config.steps} and {path} has done {trainer.step}; set steps to that or more")
    run.forget_after(trainer.step)
    run.save_recipe(config)
    trainer.open(run)
    for warning in checkpoint.warnings if checkpoint else ():
        trainer.display.say(f"warning: {warning}")
    trainer.display.say(f"resumed {path} after step {trainer.step}")
    if trainer.step >= config.steps:
        trainer.display.say(f"all {config.steps} steps are done; to train on, add --set steps=MORE")
    return trainer


def difference(old: Any, new: Any, path: str) -> str | None:
    """The first place where two pieces of plain data differ, as `a.b is 1, not 2`; None: they are equal."""
    if old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return next(filter(None, (difference(old[key], new[key], f"{path}.{key}") for key in old)))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return next(
            filter(None, (difference(*pair, f"{path}.{i}") for i, pair in enumerate(zip(old, new, strict=True))))
        )
    return f"{path} is {old!r}, not {new!r}"
