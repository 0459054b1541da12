"""A trained model, ready to write: from a run, a folder, a file, or by name."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qkv.checkpoints import Checkpoint, Store, check_depth, check_fit, digest, peft, read_folder
from qkv.checkpoints.gguf import Opened, load_gguf, open_gguf
from qkv.checkpoints.huggingface import family_of_folder, load_model, read_json
from qkv.checkpoints.named import NAMED, pull
from qkv.config import expand_home, read_yaml
from qkv.data import Tokenizer, template_of
from qkv.data.gguf_vocabulary import read_vocabulary
from qkv.errors import ConfigError, FileError, suggest
from qkv.loaded import Loaded
from qkv.models.quantise import quantise
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.nn.adapters import LoRAConfig, adapter_state, add_adapters, load_adapters, merge_adapters
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.quantised import Packed, Width
from qkv.translator import is_translator

MODEL = "model.yaml"
"""In a folder of our own layout: the config, and what else `Loaded` holds."""
_RECIPE = "recipe.yaml"


def load_language_model(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: Width | None = None,
    allow_pickle: bool = False,
) -> Loaded:
    """What `qkv.load` gives for all but models of pairs; for the parts of qkv that can use nothing else.

    Args:
        source: A run of `qkv train` (its newest whole checkpoint), a folder in Hugging Face's layout or ours (from
            `qkv convert`), a folder of PEFT's adapters, a GGUF file, the name of weights that `qkv pull` knows, or a
            model on the Hugging Face hub as owner/name (with `huggingface_hub` installed).
        device: Where the weights go.
        dtype: Type of the weights. None: that of the file; four-bit weights of a GGUF file stay packed.
        quantize: Pack the weights in memory: int8 with a scale for each row, or int4 with one for each 32 neighbours.
        allow_pickle: Also read weights that are pickled (`pytorch_model.bin`), with `weights_only`.

    Raises:
        ConfigError: Options that exclude each other.
        FileError: The source is none of these, has no checkpoint yet, or does not fit together.
    """
    if quantize is not None and (dtype is not None or torch.device(device).type != "cpu"):
        raise ConfigError(f"quantize={quantize!r} is for the CPU and sets the dtype; leave dtype and device out")
    if is_translator(source):
        raise ConfigError(f"{source} is a model of pairs, which this is not for; use qkv translate, eval or inspect")
    elsewhere = torch.device(device).type != "cpu"  # where nothing is packed
    loaded = _load(find(source), torch.bfloat16 if dtype is None and elsewhere else dtype, allow_pickle, ())
    loaded.model.to(device=device, dtype=dtype)
    if quantize is not None:
        if any(isinstance(part, Packed) for part in loaded.model.modules()):
            raise ConfigError(f"{source}: its weights are packed already; leave quantize out")
        quantise(loaded.model, quantize)
    return loaded


def find(source: str | Path) -> Path:
    """The file or folder that a source of `qkv.load` stands for; downloads what has a name.

    Raises:
        FileError: There is no such thing.
    """
    path = expand_home(source)
    if path.exists():
        return path
    if str(source) in NAMED:
        return pull(str(source))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and (found := _from_hub(str(source))):
        return found
    raise FileError(
        f"{source}: there is no such file or folder; give a run, a Hugging Face folder, a GGUF file, or a name of "
        f"`qkv pull` ({suggest(str(source), NAMED)})"
    )


def _from_hub(name: str) -> Path | None:
    """A model of the hub in the hub's own cache; None where `huggingface_hub` is not installed."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja"]  # never a pickle, never code
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the library, and what it is built on, raise a dozen types
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FileError(f"{name}: no such folder, and the hub does not give it ({reason}); check the name") from None


def load_opened(opened: Opened, dtype: torch.dtype | None) -> Loaded:
    """The model of a GGUF file, and its tokenizer.

    Args:
        opened: From `open_gguf`; its weights and metadata are no more afterwards, so that they are not in memory twice.
        dtype: As in `load_language_model`.

    Raises:
        FileError: The file does not fit together.
    """
    words = read_vocabulary(opened.metadata, source=str(opened.path))  # first: much of what it takes is free again then
    template = template_of(words.tokenizer)
    opened.metadata.clear()
    model = load_gguf(opened, dtype=dtype)
    loaded = Loaded(model, words.tokenizer, model.config, words.stop_ids, words.begin_id, template, words.add_begin)
    _check_vocabulary(loaded, opened.path)
    return loaded


def _load(path: Path, dtype: torch.dtype | None, allow_pickle: bool, above: tuple[Path, ...]) -> Loaded:
    """See `load_language_model`. `dtype`: of a GGUF file; `above`: the runs whose adapters sit on what is loaded."""
    return load_opened(open_gguf(path), dtype) if path.is_file() else _load_folder(path, allow_pickle, above)


def _load_folder(folder: Path, allow_pickle: bool, above: tuple[Path, ...]) -> Loaded:
    """See `_load`."""
    if (folder / _RECIPE).is_file():
        loaded = _load_run(folder, above)
    elif (folder / peft.CONFIG).is_file():
        loaded = _load_peft(folder)
    elif (folder / "config.json").is_file():
        loaded = _load_hugging_face(folder, allow_pickle)
    elif (folder / MODEL).is_file():
        loaded = _load_own(folder)
    elif folder.is_dir():
        raise FileError(
            f"{folder}: has neither {_RECIPE} (a run) nor config.json (Hugging Face) nor {MODEL} (qkv convert); give a "
            "folder with one of them"
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
    above, start = (*above, folder.resolve()), recipe.start
    if expand_home(start).resolve() in above:
        raise FileError(f"{folder / _RECIPE}: its adapters sit on {start}, which sits on them; mend 'start'")
    try:
        base = _load(find(start), None, False, above)
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
    if not isinstance(start, str) or not (expand_home(start) / "config.json").is_file():
        raise FileError(
            f"{folder / peft.CONFIG}: 'base_model_name_or_path' is {start!r} and must be the folder of the model that "
            "the adapters belong to, in Hugging Face's layout; mend it"
        )
    base = _load_hugging_face(expand_home(start), False)
    family, _ = family_of_folder(expand_home(start))
    return _with_adapters(base, peft.read_adapter(folder, family, base.config), str(folder))


def export_adapter(run: str | Path, folder: str | Path) -> None:
    """Write the adapters of a run as a folder of PEFT's, which `peft`, vLLM and others read.

    Args:
        run: A run with adapters, whose `start` is a folder in Hugging Face's layout.
        folder: Made if it is not there.

    Raises:
        FileError: The run has no adapters or no checkpoint, they sit on another layout, or the folder is not writable.
    """
    run = expand_home(run)
    if not (run / _RECIPE).is_file():
        raise FileError(f"{run}: is no run, and only runs have adapters to write; give one whose recipe has 'adapter'")
    recipe, checkpoint = _read_recipe(run / _RECIPE), Store(run / "checkpoints").latest()
    if recipe.adapter is None:
        raise FileError(f"{run}: trained all weights and has no adapters; give a run whose recipe has 'adapter'")
    if checkpoint is None:
        raise FileError(f"{run}: the run has no checkpoint yet; go on with it, or wait for its first one")
    adapter, base = peft.Adapter(recipe.adapter, checkpoint.tensors("adapter")), expand_home(recipe.start)
    if not (base / "config.json").is_file():
        raise FileError(
            f"{run}: its adapters sit on {recipe.start}, and PEFT knows adapters of Hugging Face folders only; use "
            "qkv convert --to hf, which merges them"
        )
    family, _ = family_of_folder(base)
    peft.write_adapter(expand_home(folder), adapter, family, recipe.model, base=recipe.start)


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
    check_depth(config.depth, n_tensors, source=str(source))
    try:
        return config.build()
    except (ConfigError, RuntimeError, TypeError) as error:  # the latter two: sizes beyond what a tensor can have
        raise FileError(f"{source}: the model cannot be built: {str(error).splitlines()[0]}") from None


def _load_own(folder: Path) -> Loaded:
    """A folder that `qkv convert --to qkv` wrote."""
    try:
        data = read_yaml(folder / MODEL)
        if not isinstance(data, dict):
            raise ConfigError("it is no mapping")
        config = TransformerConfig.from_dict(data.get("model", {}), path="model")
    except ConfigError as error:
        raise FileError(f"{folder / MODEL}: not a model of qkv: {error}") from None
    state = read_folder(folder)
    with torch.device("meta"):
        model = _build(config, len(state), folder / MODEL)
    check_fit(state, model.state_dict(), source=str(folder))
    model.load_state_dict(state, assign=True)
    tokenizer = _tokenizer(folder)
    stop, begin = ids_of(data, "stop_ids", folder / MODEL), ids_of(data, "begin_id", folder / MODEL)
    return Loaded(
        model.requires_grad_().eval(),
        tokenizer,
        config,
        stop,
        begin[0] if begin else None,
        template_of(tokenizer),
        tokenizer is not None and begin != () and tokenizer.prefix == begin,
    )


def _load_hugging_face(folder: Path, allow_pickle: bool) -> Loaded:
    model = load_model(folder, allow_pickle=allow_pickle)
    stop = _special_ids(folder, "eos_token_id")
    begin = _special_ids(folder, "bos_token_id")
    tokenizer = _tokenizer(folder)
    begins = tokenizer is not None and begin != () and tokenizer.prefix == begin[:1]
    return Loaded(model, tokenizer, model.config, stop, begin[0] if begin else None, template_of(tokenizer), begins)


def _special_ids(folder: Path, key: str) -> tuple[int, ...]:
    """Ids that the folder names: one, a list, or none. What is said about generation comes first."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file() and (found := ids_of(read_json(path), key, path)):
            return found
    return ()


def ids_of(data: Mapping[str, Any], key: str, path: Path) -> tuple[int, ...]:
    """Ids that a file names: one, a list, or none.

    Raises:
        FileError: They are something else.
    """
    match data.get(key):
        case None:
            return ()
        case bool():
            pass
        case int(value):
            return (value,)
        case list(values) if all(type(item) is int for item in values):
            return tuple(values)
    raise FileError(f"{path}: {key!r} is {data[key]!r} and must be an integer or a list of them; mend the file")


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
