"""Models in folders in the layout of Hugging Face, in and out: `config.json` and safetensors."""

import functools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qkv.checkpoints.families import FAMILIES, Family, family_of
from qkv.checkpoints.files import is_plain_name, read_json
from qkv.checkpoints.maps import build_empty
from qkv.checkpoints.tensors import read_folder, write_tensors
from qkv.disk import whole_folder, write_whole, writing
from qkv.errors import ConfigError, FileError, suggest
from qkv.models.model import Model
from qkv.shapes import Tensor


def family_of_folder(folder: Path) -> tuple[Family, dict[str, Any]]:
    """The family that the folder's `config.json` names, and what stands in it.

    Raises:
        FileError: There is no such file, or the family is not known.
    """
    path = folder / "config.json"
    data = read_json(path)
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise FileError(f"{path}: 'model_type' is {kind!r}, which qkv does not know; {suggest(str(kind), FAMILIES)}")
    return FAMILIES[kind], data


# --- in -------------------------------------------------------------------------------------------------------------


def load_model(folder: Path, *, allow_pickle: bool = False) -> Any:
    """The model of a Hugging Face folder, on the CPU, in the types of its file, memory-mapped where possible.

    Args:
        folder: With `config.json` and the weights.
        allow_pickle: Also read `pytorch_model.bin`, with `weights_only`.

    Raises:
        FileError: The family is not known, a key is not understood, or the weights do not fit the config.
    """
    family, data = family_of_folder(folder)
    source = str(folder / "config.json")
    state = read_folder(folder, allow_pickle=allow_pickle)
    config = family.parse(data, source, state.keys())
    model = build_empty(config.build, config.depth, len(state), source=source)
    state = _of_one_type(_normalise(state, family, folder, "head.weight" in model.state_dict()), data, folder)
    keys = family.keys(model.config)
    if unused := sorted(keys.unused & state.keys()):
        warnings.warn(f"{folder}: {', '.join(unused)} belong to a head that the config does not name", stacklevel=2)
    keys.check(state, model.state_dict(), source=str(folder))
    model.load_state_dict(keys.to_ours(state, source=str(folder)), assign=True)
    return model.requires_grad_().eval()


def _normalise(state: dict[str, Tensor], family: Family, folder: Path, own_head: bool) -> dict[str, Tensor]:
    """The prefix on every key, none of torch's wrappers before it, and no second copy of a tied table."""
    while {key.partition(".")[0] for key in state} in ({"module"}, {"_orig_mod"}):
        state = {key.partition(".")[2]: value for key, value in state.items()}
    if not any(key.startswith(family.prefix) for key in state):
        state = {key if key == family.head else family.prefix + key: value for key, value in state.items()}
    if not own_head and family.head in state:
        head = state.pop(family.head)
        if family.table in state and not torch.equal(head, state[family.table]):
            raise FileError(
                f"{folder}: {family.head!r} differs from {family.table!r} although the config ties them; "
                "set 'tie_word_embeddings' to false"
            )
    return state


def _of_one_type(state: dict[str, Tensor], data: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    """Weights of several types become what the config says, as in `transformers`; else the type that holds them all."""
    types = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(types) < 2:
        return state
    dtype = getattr(torch, str(data.get("dtype") or data.get("torch_dtype")), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        dtype = functools.reduce(torch.promote_types, types)
    made = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    for key, tensor in made.items():
        if tensor.is_floating_point() and not tensor.isfinite().all() and state[key].isfinite().all():
            raise FileError(f"{folder}: {key!r} has a number beyond {dtype}, the config's type; set 'dtype' to float32")
    return made


# --- out ------------------------------------------------------------------------------------------------------------


def save_model(
    model: Model,
    folder: Path,
    *,
    family: str | None = None,
    max_shard_bytes: int = 5 << 30,
    stop_ids: Sequence[int] = (),
    begin_id: int | None = None,
    pad_id: int | None = None,
    labels: Sequence[str] = (),
    sampling: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model as a folder that `transformers` and the servers built on it load: whole, or not at all.

    Args:
        model: With weights of its own, not quantised.
        folder: Is made; it may exist if it is empty.
        family: The `model_type` to write; None: the first that can express the model.
        max_shard_bytes: Weights in one file, unless a single one is larger.
        stop_ids: Tokens that end a text.
        begin_id: What a text begins with.
        pad_id: What short rows are filled with.
        labels: The names of its classes; none: LABEL_0, LABEL_1 …
        sampling: How tokens are drawn, in the words of `generation_config.json`.
        files: Further files to put there by name, such as `tokenizer.json`.

    Raises:
        ConfigError: No family can express the model, or the folder is taken.
        FileError: It cannot be written.
    """
    chosen = family_of(model.config, family)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    stop = stop_ids[0] if len(stop_ids) == 1 else list(stop_ids) or None
    ids = {"bos_token_id": begin_id, "eos_token_id": stop, "pad_token_id": pad_id}
    dtype = str(max(state.values(), key=lambda tensor: tensor.nbytes).dtype).removeprefix("torch.")
    known = {key: value for key, value in ids.items() if value is not None}
    config = ids | chosen.write(model.config) | known | {"torch_dtype": dtype}
    if labels and "id2label" in config:
        config |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    texts = {"config.json": _json(config), "generation_config.json": _json(ids | dict(sampling or {}))} | dict(
        files or {}
    )
    for name in texts:
        if not all(map(is_plain_name, name.split("/"))):
            raise ConfigError(f"{name!r} cannot name a file of a model; use letters, digits, '_', '-' and '.'")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is there already, and nothing is overwritten; choose another place, or remove it")
    with writing(folder), whole_folder(folder) as whole:
        _write_weights(chosen.keys(model.config).to_theirs(state), whole, max_shard_bytes)
        for name, text in texts.items():
            (whole / name).parent.mkdir(exist_ok=True)
            write_whole(whole / name, [text])


def _write_weights(state: dict[str, Tensor], folder: Path, max_bytes: int) -> None:
    shards = list(_shards(state, max_bytes))
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", state, {"format": "pt"})
        return
    shard_of: dict[str, str] = {}
    for i, names in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, {key: state[key] for key in names}, {"format": "pt"})
        shard_of |= dict.fromkeys(names, name)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(shard_of.items()))}
    write_whole(folder / "model.safetensors.index.json", [_json(index)])


def _shards(state: Mapping[str, Tensor], max_bytes: int) -> Iterator[list[str]]:
    """The names in each file, in the order of the model."""
    names, size = list[str](), 0
    for name, tensor in state.items():
        if names and size + tensor.nbytes > max_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
