"""`qkv show`."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qkv.cli.opening import Whole

if TYPE_CHECKING:
    from qkv.models.model import ModelConfig

DType = Literal["float64", "float32", "bfloat16", "float16"]


def show(
    model: str,
    /,
    *,
    context: Whole | None = None,
    dtype: DType = "float32",
    kernels: bool = False,
    tokens: Whole | None = None,
    batch: Whole | None = None,
) -> None:
    """Draw a model, and count what it costs.

    Args:
        model: A preset's or a recipe's name, a run, a Hugging Face folder, a GGUF file, a name that `qkv pull` knows,
            or a YAML file with a model's config or a recipe; of language models or of pairs.
        context: Tokens of the text for which to count. By default what the model is meant for, or 1024.
        dtype: Type of the weights and of the cache.
        kernels: Say instead which kernel of attention runs in which layer, and why nothing faster.
        tokens: Of a row, for kernels. By default 1024.
        batch: Rows, for kernels. By default 1.
    """
    import torch

    from qkv.checkpoints.named import NAMED
    from qkv.cli.drawing import Terminal, certificate_lines, draw, table
    from qkv.cost import summary
    from qkv.errors import ConfigError
    from qkv.loading.certificate import read_certificate
    from qkv.loading.names import find
    from qkv.yaml_files import expand_home

    for name, given in (("--tokens", tokens), ("--batch", batch)):
        if given is not None and not kernels:
            raise ConfigError(f"{name} is for --kernels; add that, or leave it out")
    whole, folder, numbers = find_config(model), expand_home(model), getattr(torch, dtype)
    config, console = whole.single_stack, Terminal()
    if config is None:
        from qkv.cli.pairs import show_parts

        for name, given in (("--kernels", kernels), ("--context", context is not None)):
            if given:
                raise ConfigError(f"{name} is for language models and {model} is a model of pairs; leave it out")
        return show_parts(folder.absolute().name, whole, folder, numbers)
    if kernels:
        from qkv.cli.kernels import kernels as table_of_kernels

        tokens, batch = 1024 if tokens is None else tokens, 1 if batch is None else batch
        if tokens < 1 or batch < 1:
            raise ConfigError(f"--tokens={tokens} and --batch={batch} must be at least 1")
        return console.print(table_of_kernels(config, tokens=tokens, batch=batch, dtype=numbers))
    cost = summary(config, context=context, dtype=numbers)
    console.print(draw(folder.absolute().name, config, cost))
    console.print(table(cost))
    if kept := _kept(folder if folder.exists() or model not in NAMED else find(model)):
        console.print(f"The weights as they are kept: {kept}", style="dim", markup=False)
    if folder.is_dir() and (found := read_certificate(folder)):
        console.print("\n".join(certificate_lines(found)), markup=False)


def _kept(path: Path) -> str:
    """The bytes of the weights of each type in a GGUF file or a folder of safetensors; empty: there are none."""
    from qkv.checkpoints.gguf.reader import read_gguf
    from qkv.checkpoints.tensors import read_tensors
    from qkv.cli.drawing import size_in_bytes

    sizes = Counter[str]()
    if path.is_file() and path.suffix == ".gguf":
        for tensor in read_gguf(path).tensors.values():
            sizes[tensor.kind.lower()] += tensor.data.nbytes
    for file in path.glob("model*.safetensors") if path.is_dir() else ():
        for tensor in read_tensors(file).values():
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return ", ".join(f"{size_in_bytes(size)} {kind}" for kind, size in sizes.most_common())


def find_config(model: str) -> "ModelConfig":
    """The config that a name or path stands for.

    Raises:
        ConfigError: It is neither a path nor a preset, or the file holds no model.
        FileError: The path cannot be read.
    """
    from qkv.checkpoints.named import NAMED
    from qkv.errors import ConfigError
    from qkv.loading.layouts import config_of
    from qkv.presets import preset
    from qkv.training.recipe_files import built_in_recipe
    from qkv.yaml_files import expand_home

    path = expand_home(model)
    if path.is_dir() or path.suffix == ".gguf" or model in NAMED:
        return config_of(path if path.exists() else model)
    if path.exists() or path.suffix in (".yaml", ".yml", ".json") or len(path.parts) > 1:
        return _read(path)
    if recipe := built_in_recipe(model):
        return _read(recipe)
    try:
        return preset(model)
    except ConfigError as error:
        raise ConfigError(f"{model}: no such file or folder, and {error}") from None


def _read(path: Path) -> "ModelConfig":
    from qkv.errors import ConfigError
    from qkv.loading.building import model_config
    from qkv.loading.layouts import config_of
    from qkv.training.recipe import StartConfig
    from qkv.training.recipe_files import expand_preset
    from qkv.yaml_files import read_yaml

    data = read_yaml(path)
    if not isinstance(data, dict):
        found = "nothing" if data is None else "no model"
        raise ConfigError(f"{path}: holds {found}; give a model's config, or a recipe with a key 'model'")
    if data.get("model") is None and isinstance(data.get("start"), dict):
        return _for_context(config_of(StartConfig.from_dict(data["start"], path="start").path), data)
    recipe = data if "model" in data else {"model": data}
    try:
        expand_preset(recipe)
        return _for_context(model_config(recipe["model"], path="model" if "model" in data else ""), data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _for_context(model: "ModelConfig", recipe: dict[str, Any]) -> "ModelConfig":
    """The model as the recipe trains it: for texts of its context, where the model names none."""
    from qkv.training.recipe import RecipeConfig

    if model.single_stack is None or model.single_stack.context is not None or "data" not in recipe:
        return model
    return model.replace(context=recipe.get("context", RecipeConfig.context))
