"""Models from folders in the layout of Hugging Face: `config.json` and safetensors."""

import json
from pathlib import Path
from typing import Any

import torch

from qkv.checkpoints.families import FAMILIES, Family
from qkv.checkpoints.families.family import ConfigReader, one_block
from qkv.checkpoints.maps import check_fit
from qkv.checkpoints.tensors import read_folder
from qkv.errors import FileError, suggest
from qkv.models.transformer import Transformer
from qkv.shapes import Tensor

MAX_CONFIG = 4 << 20  # bytes


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a small file.

    Raises:
        FileError: The file is missing, too large, or holds something else.
    """
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise FileError(f"{path}: has {path.stat().st_size} bytes, more than a config can have ({MAX_CONFIG})")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError):
        raise FileError(f"{path}: is not JSON; download or write it again") from None
    if not isinstance(data, dict):
        raise FileError(f"{path}: holds a {type(data).__name__} and must hold an object")
    return data


def family_of(folder: Path) -> Family:
    """The family that the folder's `config.json` names.

    Raises:
        FileError: There is no such file, or the family is not known.
    """
    path = folder / "config.json"
    kind = read_json(path).get("model_type")
    if kind not in FAMILIES:
        raise FileError(f"{path}: 'model_type' is {kind!r}, which qkv does not know; {suggest(str(kind), FAMILIES)}")
    return FAMILIES[kind]


def load_model(folder: Path, *, allow_pickle: bool = False) -> Transformer:
    """The model of a Hugging Face folder, on the CPU, in the types of its file, memory-mapped where possible.

    Args:
        folder: With `config.json` and the weights.
        allow_pickle: Also read `pytorch_model.bin`, with `weights_only`.

    Raises:
        FileError: The family is not known, a key is not understood, or the weights do not fit the config.
    """
    path = folder / "config.json"
    family = family_of(folder)
    config = family.read(ConfigReader(read_json(path), str(path)))
    state = read_folder(folder, allow_pickle=allow_pickle)
    n_layers, _ = one_block(config)
    if n_layers > len(state):  # before anything of that size is built
        raise FileError(f"{path}: asks for {n_layers} layers and the folder has {len(state)} tensors; mend the file")
    with torch.device("meta"):
        model = config.build()
    state = _normalise(state, family, folder, "head.weight" in model.state_dict())
    ours = family.keys(config).to_ours(state, source=str(folder))
    check_fit(ours, model.state_dict(), source=str(folder))
    model.load_state_dict(ours, assign=True)
    return model.requires_grad_().eval()


def _normalise(state: dict[str, Tensor], family: Family, folder: Path, own_head: bool) -> dict[str, Tensor]:
    """The prefix on every key, and no second copy of a tied table."""
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
