"""A trained model from a folder, ready to write."""

import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from qkv.checkpoints import Checkpoint, Store, check_fit, digest, peft
from qkv.checkpoints.huggingface import family_of_folder, load_model, read_json
from qkv.config import read_yaml
from qkv.data import Tokenizer, template_of
from qkv.errors import ConfigError, FileError
from qkv.loaded import Loaded
from qkv.models.transformer import Repeat, Transformer, TransformerConfig
from qkv.nn.adapters import LoRAConfig, adapter_state, add_adapters, load_adapters, merge_adapters
from qkv.nn.embedders import TokenEmbedderConfig

_RECIPE = "recipe.yaml"
_MAX_SHARED = 1000  # applications of blocks that share weights; the file of a stranger may ask for any number


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
) -> Loaded:
    """A model from a folder: a run of `qkv train` (its newest whole checkpoint), or one in Hugging Face's layout.

    Args:
        path: The folder.
        device: Where the weights go.
        dtype: Type of the weights; None: that of the file.
        allow_pickle: Also read weights that are pickled (`pytorch_model.bin`), with `weights_only`.

    Raises:
        FileError: The folder is neither, has no checkpoint yet, or does not fit together.
    """
    loaded = _load_folder(Path(path).expanduser(), allow_pickle, ())
    loaded.model.to(device=device, dtype=dtype)
    return loaded


def _load_folder(folder: Path, allow_pickle: bool, above: tuple[Path, ...]) -> Loaded:
    """See `load`. `above`: the runs whose adapters sit on what is loaded."""
    if (folder / _RECIPE).is_file():
        loaded = _load_run(folder, above)
    elif (folder / peft.CONFIG).is_file():
        loaded = _load_peft(folder)
    elif (folder / "config.json").is_file():
        loaded = _load_hugging_face(folder, allow_pickle)
    elif folder.is_dir():
        raise FileError(
            f"{folder}: has neither {_RECIPE} (a run) nor config.json (Hugging Face); give a folder with one"
        )
    else:
        raise FileError(f"{folder}: there is no such folder; give a run or a folder in Hugging Face's layout")
    _check_vocabulary(loaded, folder)
    return loaded


def _load_run(folder: Path, above: tuple[Path, ...]) -> Loaded:
    recipe = _read_recipe(folder / _RECIPE)
    checkpoint = Store(folder / "checkpoints").latest()
    if checkpoint is None:
        raise FileError(f"{folder}: the run has no checkpoint yet; go on with it, or wait for its first one")
    for warning in checkpoint.warnings:
        warnings.warn(warning, stacklevel=4)
    if recipe.adapter is not None:
        return _load_adapted(folder, recipe, checkpoint, above)
    state = checkpoint.tensors("model")
    with torch.device("meta"):
        model = _build(recipe.model, len(state), folder / _RECIPE)
    check_fit(state, model.state_dict(), source=str(checkpoint.path))
    model.load_state_dict(state, assign=True)
    tokenizer = _tokenizer(folder)
    stop = () if tokenizer is None or tokenizer.end_of_text is None else (tokenizer.end_of_text,)
    return Loaded(model.requires_grad_().eval(), tokenizer, recipe.model, stop, template=template_of(tokenizer))


def _load_adapted(folder: Path, recipe: "_Recipe", checkpoint: Checkpoint, above: tuple[Path, ...]) -> Loaded:
    """What the run started from, with the run's adapters merged into its weights, which are float32 as in training."""
    above = (*above, folder.resolve())
    start = Path(recipe.start).expanduser()
    if start.resolve() in above:
        raise FileError(f"{folder / _RECIPE}: its adapters sit on {start}, which sits on them; mend 'start'")
    try:
        base = _load_folder(start, False, above)
    except FileError as error:
        raise FileError(f"{folder}: what its adapters sit on cannot be loaded: {error}") from None
    if checkpoint.state.get("base") != digest(base.model.state_dict()):
        raise FileError(
            f"{folder}: its adapters belong to the weights that {start} had when the run began, and those are others "
            "now; put them back"
        )
    assert recipe.adapter is not None
    return _with_adapters(base, peft.Adapter(recipe.adapter, checkpoint.tensors("adapter")), str(checkpoint.path))


def _with_adapters(base: Loaded, adapter: peft.Adapter, source: str) -> Loaded:
    """The same with adapters merged into its weights, in float32."""
    model = base.model.float()
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
        add_adapters(model, adapter.config)
    check_fit(adapter.state, adapter_state(model), source=source)
    load_adapters(model, adapter.state)
    merge_adapters(model)
    return base


def _load_peft(folder: Path) -> Loaded:
    start = read_json(folder / peft.CONFIG).get("base_model_name_or_path")
    if not isinstance(start, str) or not (Path(start).expanduser() / "config.json").is_file():
        raise FileError(
            f"{folder / peft.CONFIG}: 'base_model_name_or_path' is {start!r} and must be the folder of the model that "
            "the adapters belong to, in Hugging Face's layout; mend it"
        )
    base = _load_hugging_face(Path(start).expanduser(), False)
    family, _ = family_of_folder(Path(start).expanduser())
    return _with_adapters(base, peft.read_adapter(folder, family, base.config), str(folder))


def export_adapter(run: str | Path, folder: str | Path) -> None:
    """Write the adapters of a run as a folder of PEFT's, which `peft`, vLLM and others read.

    Args:
        run: A run with adapters, whose `start` is a folder in Hugging Face's layout.
        folder: Made if it is not there.

    Raises:
        FileError: The run has no adapters or no checkpoint, or the folder cannot be written.
    """
    run = Path(run).expanduser()
    recipe, checkpoint = _read_recipe(run / _RECIPE), Store(run / "checkpoints").latest()
    if recipe.adapter is None or checkpoint is None:
        raise FileError(f"{run}: has no adapters to write; give a run whose recipe has 'adapter'")
    adapter = peft.Adapter(recipe.adapter, checkpoint.tensors("adapter"))
    family, _ = family_of_folder(Path(recipe.start).expanduser())
    peft.write_adapter(Path(folder).expanduser(), adapter, family, recipe.model, base=recipe.start)


class _Recipe(NamedTuple):
    """What loading reads of a run's recipe."""

    model: TransformerConfig
    adapter: LoRAConfig | None
    start: str


def _read_recipe(path: Path) -> _Recipe:
    try:
        data = read_yaml(path)
        if not isinstance(data, dict) or "model" not in data:
            raise ConfigError("it has no 'model'")
        model = TransformerConfig.from_dict(data["model"], path="model")
        if data.get("adapter") is None:
            return _Recipe(model, None, "")
        match data.get("start"):
            case {"path": str(start)}:
                return _Recipe(model, LoRAConfig.from_dict(data["adapter"], path="adapter"), start)
        raise ConfigError("it has an 'adapter' and no 'start' with a path")
    except ConfigError as error:
        raise FileError(f"{path}: not the recipe of a run: {error}") from None


def _build(config: TransformerConfig, n_tensors: int, source: Path) -> Transformer:
    parts = config.blocks if isinstance(config.blocks, tuple) else (config.blocks,)
    depth = sum(
        part.n * (len(part.pattern) if isinstance(part.pattern, tuple) else 1) if isinstance(part, Repeat) else 1
        for part in parts
    )
    if depth > max(n_tensors, _MAX_SHARED):  # before anything of that size is built
        raise FileError(f"{source}: asks for {depth} blocks and there are {n_tensors} tensors of weights; mend 'model'")
    try:
        return config.build()
    except (ConfigError, RuntimeError, TypeError) as error:  # the latter two: sizes beyond what a tensor can have
        raise FileError(f"{source}: the model cannot be built: {str(error).splitlines()[0]}") from None


def _load_hugging_face(folder: Path, allow_pickle: bool) -> Loaded:
    model = load_model(folder, allow_pickle=allow_pickle)
    stop = _special_ids(folder, "eos_token_id")
    begin = _special_ids(folder, "bos_token_id")
    tokenizer = _tokenizer(folder)
    return Loaded(model, tokenizer, model.config, stop, begin[0] if begin else None, template_of(tokenizer))


def _special_ids(folder: Path, key: str) -> tuple[int, ...]:
    """Ids that the folder names: one, a list, or none. What is said about generation comes first."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = read_json(path).get(key) if path.is_file() else None
        match value:
            case None:
                continue
            case bool():
                pass
            case int():
                return (value,)
            case list() if all(type(item) is int for item in value):
                return tuple(value)
        raise FileError(f"{path}: {key!r} is {value!r} and must be an integer or a list of them; mend the file")
    return ()


def _tokenizer(folder: Path) -> Tokenizer | None:
    return Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None


def _check_vocabulary(loaded: Loaded, folder: Path) -> None:
    embed = loaded.config.embed
    if loaded.tokenizer is None or not isinstance(embed, TokenEmbedderConfig) or embed.vocab_size is None:
        return
    if loaded.tokenizer.vocab_size > embed.vocab_size:
        raise FileError(
            f"{folder}: the tokenizer has {loaded.tokenizer.vocab_size} tokens and the model {embed.vocab_size}; "
            "put the tokenizer there that belongs to the model"
        )
