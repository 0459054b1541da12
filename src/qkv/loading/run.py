"""Runs of `qkv train`: the newest whole checkpoint, and adapters with what they sit on."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import torch

from qkv.checkpoints import Checkpoint, Store, peft
from qkv.checkpoints.formats import digest_of_base
from qkv.checkpoints.huggingface import family_of_folder
from qkv.errors import ConfigError, FileError
from qkv.loading.building import build_with, model_config
from qkv.loading.foreign import merged
from qkv.loading.names import find
from qkv.loading.reader import Reader
from qkv.loading.ready import Options, Ready
from qkv.loading.saved import ready_in
from qkv.models.model import ModelConfig
from qkv.models.transformer import TransformerConfig
from qkv.nn.adapters import LoRAConfig
from qkv.nn.quantised import is_packed
from qkv.tasks import DataConfig, TaskConfig
from qkv.yaml_files import expand_home, read_yaml

RECIPE: Final = "recipe.yaml"


class _Recipe(NamedTuple):
    model: ModelConfig
    data: TaskConfig | None
    adapter: LoRAConfig | None
    start: str


def open_run(folder: Path, options: Options) -> Ready:
    """The model of a run's newest whole checkpoint.

    Raises:
        FileError: The run has no checkpoint yet, or does not fit together.
    """
    _check_run(folder)
    recipe, checkpoint = _read_recipe(folder), _newest(folder)
    for warning in checkpoint.warnings:
        warnings.warn(warning, stacklevel=4)
    if recipe.adapter is not None:
        return _with_adapters(folder, recipe, checkpoint, options)
    model = build_with(recipe.model, checkpoint.tensors("model"), folder / RECIPE, str(checkpoint.path))
    return ready_in(model, folder) if recipe.data is None else recipe.data.open(folder, model)


def read_run_config(folder: Path) -> ModelConfig:
    """The config of a run's model, also before its first checkpoint.

    Raises:
        FileError: The recipe is damaged.
    """
    return _read_recipe(folder).model


def read_run_data(folder: Path) -> TaskConfig | None:
    """What a run was trained on; None: its recipe does not say. Errors as for `read_run_config`."""
    return _read_recipe(folder).data


def _with_adapters(folder: Path, recipe: _Recipe, checkpoint: Checkpoint, options: Options) -> Reader:
    """What the run started from, with the run's adapters merged into its weights, which are float32 as in training."""
    start, adapter = recipe.start, recipe.adapter
    assert adapter is not None
    options = Options(options.open, above=(*options.above, folder.resolve()))
    wide = replace(options, dtype=torch.float32)
    if expand_home(start).resolve() in options.above:
        raise FileError(f"{folder / RECIPE}: its adapters sit on {start}, which sits on them; fix 'start'")
    try:
        base = options.open(find(start), options)
        base = options.open(find(start), wide) if is_packed(base.model) else base
    except FileError as error:
        raise FileError(f"{folder}: what its adapters sit on cannot be loaded: {error}") from None
    if checkpoint.state.get("base") != digest_of_base(base.model.state_dict()):
        raise FileError(
            f"{folder}: its adapters belong to the weights that {start} had when the run began, and those are others "
            "now; put them back"
        )
    if "head" in checkpoint.files:  # one of its own, trained beside the adapters
        assert recipe.data is not None
        body = {name: p.float() for name, p in base.model.state_dict().items() if not name.startswith("head.")}
        model = build_with(recipe.model, body | checkpoint.tensors("head"), folder / RECIPE, str(checkpoint.path))
        base = recipe.data.open(folder, model)
    assert isinstance(base, Reader)  # of anything else the hash is another one
    return merged(base, peft.Adapter(adapter, checkpoint.tensors("adapter")), str(checkpoint.path))


def export_adapter(run: str | Path, folder: str | Path) -> None:
    """Write the adapters of a run as a folder of PEFT's, which `peft`, vLLM and others read.

    Args:
        run: A run with adapters, whose `start` is a folder in Hugging Face's layout.
        folder: Made if it is not there.

    Raises:
        FileError: The run has no adapters or no checkpoint, they sit on another layout, or the folder is not writable.
    """
    run = expand_home(run)
    if not (run / RECIPE).is_file():
        raise FileError(f"{run}: is no run, and only runs have adapters to write; give one whose recipe has 'adapter'")
    recipe = _read_recipe(run)
    if recipe.adapter is None:
        raise FileError(f"{run}: trained all weights and has no adapters; give a run whose recipe has 'adapter'")
    checkpoint, base = _newest(run), expand_home(recipe.start)
    adapter = peft.Adapter(recipe.adapter, checkpoint.tensors("adapter"))
    if "head" in checkpoint.files:
        raise FileError(f"{run}: trained a head beside its adapters; use qkv convert --to hf, which merges both")
    if not (base / "config.json").is_file():
        raise FileError(
            f"{run}: its adapters sit on {recipe.start}, and PEFT knows adapters of Hugging Face folders only; use "
            "qkv convert --to hf, which merges them"
        )
    family, _ = family_of_folder(base)
    assert isinstance(recipe.model, TransformerConfig)
    peft.write_adapter(expand_home(folder), adapter, family, recipe.model, base=recipe.start)


def _newest(folder: Path) -> Checkpoint:
    checkpoint = Store(folder / "checkpoints").latest()
    if checkpoint is None:
        raise FileError(f"{folder}: the run has no checkpoint yet; resume it, or wait for its first one")
    return checkpoint


def _read_recipe(folder: Path) -> _Recipe:
    try:
        data = read_yaml(folder / RECIPE)
        if not isinstance(data, dict) or "model" not in data:
            raise ConfigError("it has no 'model'")
        model = model_config(data["model"])
        task = data.get("data")
        if isinstance(task, dict):
            task = TaskConfig.from_dict({"type": DataConfig.tag()} | task, path="data")
        if data.get("adapter") is None:
            return _Recipe(model, task, None, "")
        match data.get("start"):
            case {"path": str(start)}:
                return _Recipe(model, task, LoRAConfig.from_dict(data["adapter"], path="adapter"), start)
        raise ConfigError("it has an 'adapter' and no 'start' with a path")
    except ConfigError as error:
        _check_run(folder)
        raise FileError(f"{folder / RECIPE}: not the recipe of a run: {error}") from None


def _check_run(folder: Path) -> None:
    if not (folder / "checkpoints").exists():
        raise FileError(
            f"{folder / RECIPE}: is a recipe and no run, which has a folder checkpoints; train it with qkv train, and "
            "give the folder that this writes"
        )
