"""`qkv eval`: a model, measured as its task says."""

import warnings
from dataclasses import replace

from qkv.errors import ConfigError
from qkv.loading.layouts import load_plain
from qkv.loading.run import read_run_data
from qkv.tasks import Asked, Report, task_of
from qkv.training.run import RECIPE, Run
from qkv.yaml_files import expand_home


def evaluate_model(asked: Asked) -> Report:
    """What the task of a model reports: that of its run, or the one whose runs are opened as such a model.

    Raises:
        FileError: The model or the data cannot be read.
        ConfigError: Options that the task does not have; or there are no data.
    """
    path = expand_home(asked.path)
    opened, task = load_plain(path, lambda note: warnings.warn(note, stacklevel=3)), None
    if (path / RECIPE).is_file():
        asked = replace(asked, trained=read_run_data(path))
    if asked.data is None and (path / RECIPE).is_file():
        recipe, checkpoint = Run.saved_recipe(path), Run(path, keep=1).store.latest()
        known = None if checkpoint is None else checkpoint.state.get("data")
        asked, task = replace(asked, recipe=recipe, fingerprint=known), type(recipe.data)
    task = task or task_of(opened)
    if task is None:
        raise ConfigError(f"{path}: no task measures {opened.what} with such a head; give a run")
    return task.evaluate(opened, replace(asked, path=path))
