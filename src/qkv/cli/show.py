"""`qkv show`."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qkv.cli.opening import Whole

if TYPE_CHECKING:
    from qkv.models.pairs import PairModelConfig
    from qkv.models.transformer import TransformerConfig

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
    from rich.console import Console

    from qkv.certificate import read_certificate
    from qkv.cli.drawing import certificate_lines, draw, table
    from qkv.config import expand_home
    from qkv.cost import summary
    from qkv.errors import ConfigError
    from qkv.models.pairs import PairModelConfig

    for name, given in (("--tokens", tokens), ("--batch", batch)):
        if given is not None and not kernels:
            raise ConfigError(f"{name} is for --kernels; add that, or leave it out")
    config = find_config(model)
    if isinstance(config, PairModelConfig):
        from qkv.cli.pairs import show_pairs

        for name, given in (("--kernels", kernels), ("--context", context is not None)):
            if given:
                raise ConfigError(f"{name} is for language models and {model} is a model of pairs; leave it out")
        return show_pairs(expand_home(model).absolute().name, config, expand_home(model), getattr(torch, dtype))
    if kernels:
        from qkv.cli.kernels import kernels as table_of_kernels

        tokens, batch = 1024 if tokens is None else tokens, 1 if batch is None else batch
        if tokens < 1 or batch < 1:
            raise ConfigError(f"--tokens={tokens} and --batch={batch} must be at least 1")
        return Console(highlight=False).print(
            table_of_kernels(config, tokens=tokens, batch=batch, dtype=getattr(torch, dtype))
        )
    cost = summary(config, context=context, dtype=getattr(torch, dtype))
    console = Console(highlight=False)
    console.print(draw(expand_home(model).absolute().name, config, cost))
    console.print(table(cost))
    if (folder := expand_home(model)).is_dir() and (found := read_certificate(folder)):
        console.print("\n".join(certificate_lines(found)), markup=False)


def find_config(model: str) -> "TransformerConfig | PairModelConfig":
    """The config that a name or path stands for.

    Raises:
        ConfigError: It is neither a path nor a preset, or the file holds no model.
        FileError: The path cannot be read.
    """
    from qkv.api import load_language_model
    from qkv.checkpoints.gguf import open_gguf
    from qkv.checkpoints.named import NAMED, pull
    from qkv.config import expand_home
    from qkv.presets import preset
    from qkv.presets.translators import PAIR_PRESETS
    from qkv.training.recipe_files import built_in_recipe
    from qkv.translator import is_translator, load_translator

    if model in PAIR_PRESETS and not Path(model).exists():
        return PAIR_PRESETS[model]()
    path = pull(model) if model in NAMED else expand_home(model)
    if path.suffix == ".gguf":
        return open_gguf(path).config
    if path.is_dir():
        recipe = path / "recipe.yaml"  # enough to draw a run that has no checkpoint yet
        if recipe.is_file():
            return _read(recipe)
        return load_translator(path).model.config if is_translator(path) else load_language_model(path).config
    if path.exists() or path.suffix in (".yaml", ".yml", ".json") or len(path.parts) > 1:
        return _read(path)
    recipe = built_in_recipe(model)
    return preset(model) if recipe is None else _read(recipe)


def _read(path: Path) -> "TransformerConfig | PairModelConfig":
    from qkv.api import load_language_model
    from qkv.config import read_yaml
    from qkv.errors import ConfigError
    from qkv.models.pairs import PairModelConfig
    from qkv.models.transformer import TransformerConfig
    from qkv.training.recipe import StartConfig
    from qkv.training.recipe_files import expand_preset
    from qkv.translator import is_translator, load_translator

    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds no model; give a model's config, or a recipe with a key 'model'")
    if data.get("model") is None and isinstance(data.get("start"), dict):
        start = StartConfig.from_dict(data["start"], path="start").path
        return load_translator(start).model.config if is_translator(start) else load_language_model(start).config
    recipe = data if "model" in data else {"model": data}
    try:
        expand_preset(recipe)
        kind = recipe["model"].get("type") if isinstance(recipe["model"], dict) else None
        of_pairs = kind in {cls.tag() for cls in PairModelConfig.__subclasses__()}
        cls = PairModelConfig if of_pairs else TransformerConfig
        return cls.from_dict(recipe["model"], path="model" if "model" in data else "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
