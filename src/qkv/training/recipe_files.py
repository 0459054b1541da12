"""Recipes in files: those that come with qkv, changes on the command line, and presets of models."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qkv.config import Config
from qkv.errors import ConfigError, FileError, suggest
from qkv.presets import preset
from qkv.training.recipe import RecipeConfig
from qkv.yaml_files import assign, read_yaml

_BUILT_IN = Path(__file__).parent.parent / "recipes"


def built_in_recipe(name: str) -> Path | None:
    """The file of a recipe that comes with qkv, such as `shakespeare`; None: there is none of that name."""
    return {file.stem: file for file in _BUILT_IN.glob("*.yaml")}.get(name)


def read_recipe(recipe: Path | Mapping[str, Any], sets: Sequence[str] = ()) -> RecipeConfig:
    """A recipe from a YAML file, or from what would stand in one, with changes such as `"optimizer.lr=3e-4"`.

    The name of a recipe that comes with qkv, such as `shakespeare`, stands for its file.

    Raises:
        FileError: The file cannot be read.
        ConfigError: It is not a recipe; the message names the key.
    """
    data = read_recipe_data(recipe)
    for change in sets:
        key = change.partition("=")[0]
        if key == "model.preset":
            _allow_preset(data, change)
        elif key.startswith("model."):  # inside what the preset says
            expand_preset(data)
        assign(data, change)
    expand_preset(data)
    try:
        return RecipeConfig.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{recipe if isinstance(recipe, Path) else 'the recipe'}: {error}") from None


def read_recipe_data(recipe: Path | Mapping[str, Any] | RecipeConfig) -> dict[str, Any]:
    """A recipe as plain data, to be changed. Errors as for `read_recipe`."""
    if isinstance(recipe, RecipeConfig):
        return recipe.to_dict()
    if not isinstance(recipe, Path | Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"the recipe is {recipe!r}; give a path, a mapping like a recipe's file, or a RecipeConfig")
    if isinstance(recipe, Mapping):
        plain = {key: value.to_dict() if isinstance(value, Config) else value for key, value in recipe.items()}
        return copy.deepcopy(plain)
    file = recipe if recipe.exists() else built_in_recipe(str(recipe))
    if file is None:
        known = sorted(file.stem for file in _BUILT_IN.glob("*.yaml"))
        raise FileError(f"{recipe}: no such file, and no recipe of that name; {suggest(str(recipe), known)}")
    data = read_yaml(file)
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{recipe}: holds {found} and must hold the keys of a recipe, such as model, data and steps")
    return data


def expand_preset(data: dict[str, Any]) -> None:
    """Put the preset's config where `data["model"]` names one, in place; keys beside `preset` change it."""
    model = data.get("model")
    if isinstance(model, str):
        data["model"] = preset(model).to_dict()
    elif isinstance(model, dict) and "preset" in model:
        changes = {key: value for key, value in model.items() if key != "preset"}
        parts = {key: value for key, value in changes.items() if isinstance(value, dict | list)}
        sizes = {key: value for key, value in changes.items() if key not in parts}
        data["model"] = preset(str(model["preset"]), **sizes).to_dict() | parts


def _allow_preset(data: dict[str, Any], change: str) -> None:
    """Refuse a preset where the model is written out: all of its keys would stand above the preset's."""
    model = data.get("model")
    if model is None or isinstance(model, str):
        data["model"] = {"preset": model}
    elif isinstance(model, dict) and "preset" not in model and model:
        name = change.partition("=")[2]
        raise ConfigError(f"--set {change}: the recipe writes the model out; --set model={name} replaces it as a whole")
