"""Our own layout: any model as `model.yaml` and safetensors, with its tokenizers beside them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkv.checkpoints import check_fit, read_folder, write_tensors
from qkv.checkpoints.formats import FORMAT, from_format
from qkv.data.pairs import SIDES
from qkv.disk import whole_folder, write_whole, writing
from qkv.errors import ConfigError, FileError
from qkv.loading.building import build_with, model_config
from qkv.loading.encoder import Encoder
from qkv.loading.facts import Facts
from qkv.loading.loaded import Loaded
from qkv.loading.matcher import Matcher
from qkv.loading.reader import Reader
from qkv.loading.ready import Bare, Options, Ready, tokenizer_in
from qkv.loading.translator import Translator
from qkv.models.model import Model
from qkv.models.pairs import PairModel
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.models.two_towers import TwoTowers
from qkv.nn.adapters import LoRALinear
from qkv.nn.heads import ClassHeadConfig
from qkv.nn.quantised import Packed
from qkv.tasks import task_named, task_of
from qkv.yaml_files import dump_yaml, expand_home, read_yaml

MODEL = "model.yaml"
"""The file with the config, and the facts beside it."""

# --- in -------------------------------------------------------------------------------------------------------------


def open_saved(folder: Path, options: Options) -> Ready:
    """What `save` wrote.

    Raises:
        FileError: The folder does not fit together.
    """
    path = folder / MODEL
    try:
        data = read_yaml(path)
        if not isinstance(data, dict):
            raise ConfigError("it is no mapping")
        number = data.pop("format", 1)
        if type(number) is not int or not 1 <= number <= FORMAT:
            raise ConfigError(f"format={number!r} is not one of 1 to {FORMAT}; load it with a newer qkv")
        config = model_config(data.pop("model", {}))
        task = task_named(data.pop("task")) if "task" in data else None
        known = Facts.from_dict(data) if data else None
    except ConfigError as error:
        raise FileError(f"{path}: not a model of qkv: {error}") from None
    model = build_with(config, from_format(number, read_folder(folder)), path, str(folder))
    ready = ready_in(model, folder, known) if task is None else task.open(folder, model)
    if isinstance(ready, Loaded) and known is not None and "begins" not in data:  # an older folder
        begins = ready.tokenizer is not None and ready.tokenizer.frame == ((known.begin_id,), ())
        return replace(ready, facts=replace(known, begins=begins))
    return ready


def ready_in(model: Model, folder: Path, facts: Facts | None = None) -> Ready:
    """A model with the tokenizers that lie in a folder; None for the facts: those of a model that qkv trained.

    Raises:
        FileError: A tokenizer is damaged.
    """
    if isinstance(model, Transformer):
        tokenizer = tokenizer_in(folder)
        if _is_encoder(model.config):
            return Encoder(model, tokenizer, facts or Facts())
        return Loaded.of(model, tokenizer, facts)
    if isinstance(model, TwoTowers):
        return Matcher(model, tokenizer_in(folder), facts or Facts())
    if isinstance(model, PairModel) and all((folder / side / "tokenizer.json").is_file() for side in SIDES):
        return Translator.read(model, folder, facts)
    return Bare(model)


def _is_encoder(config: TransformerConfig) -> bool:
    """Whether it reads both ways, or its head gives classes."""
    return config.mask_ahead is not None or isinstance(config.head, ClassHeadConfig)


# --- out ------------------------------------------------------------------------------------------------------------


def save(model: nn.Module | Ready, folder: str | Path) -> None:
    """Write a model as a folder that `qkv.load` reads: whole, or not at all.

    Args:
        model: Any model of qkv, alone or as `qkv.load` handed it out: then its tokenizers and what else is known of it
            are written, too.
        folder: Is made. What `save` wrote there before is replaced; anything else is left as it is.

    Raises:
        ConfigError: The model cannot be written as it is, or the folder is taken.
        FileError: It cannot be written.
    """
    write(model if isinstance(model, Ready) else _bare(model), expand_home(folder), {})


def _bare(model: nn.Module) -> Ready:
    if not isinstance(model, Model):
        raise ConfigError(f"{type(model).__name__} is no model of qkv, with a config to build it from; give one")
    if isinstance(model, Transformer):
        return Encoder(model) if _is_encoder(model.config) else Loaded(model)
    return Matcher(model) if isinstance(model, TwoTowers) else Bare(model)


def write(ready: Ready, folder: Path, files: Mapping[str, bytes]) -> None:
    """As `save`, with further files by name."""
    state = _plain_state(ready.model)
    facts = {} if ready.facts is None else ready.facts.to_dict()
    facts.pop("type", None)
    task = None if isinstance(ready, Reader | Translator | Matcher | Bare) else task_of(ready)
    named = {} if task is None else {"task": task.tag()}
    text = dump_yaml({"format": FORMAT, "model": ready.config.to_dict()} | named | facts)
    files = {MODEL: text.encode()} | ready.files() | dict(files)
    _require_free(folder)
    with writing(folder), whole_folder(folder) as whole:
        write_tensors(whole / "model.safetensors", state, {"format": "pt"})
        for name, data in files.items():
            (whole / name).parent.mkdir(exist_ok=True)
            write_whole(whole / name, [data])


def _plain_state(model: Any) -> dict[str, torch.Tensor]:
    """The weights, if they are what a model of that config has.

    Raises:
        ConfigError: They are packed, have adapters beside them, or are of another model.
    """
    for part in model.modules():
        if isinstance(part, Packed):
            raise ConfigError(
                "the model's weights are packed; load it with a dtype, such as torch.float32, and save that"
            )
        if isinstance(part, LoRALinear):
            raise ConfigError("the model has adapters beside its weights; call qkv.merge_adapters(model) before")
    state = model.state_dict()
    try:
        with torch.device("meta"):
            check_fit(state, model.config.build().state_dict(), source="the model")
    except FileError as error:
        raise ConfigError(f"{error}: it is not what its config says; save a model as its config built it") from None
    return state


_OURS = {
    MODEL,
    "1_Pooling",
    "model.safetensors",
    "certificate.json",
    "chat_template.jinja",
    "modules.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def _require_free(folder: Path) -> None:
    """Refuse a place where something else lies than what `save` wrote."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    if names and not ((folder / MODEL).is_file() and names <= _OURS | set(SIDES)):
        raise ConfigError(f"{folder}: is there already, and nothing is overwritten; choose another place, or remove it")
