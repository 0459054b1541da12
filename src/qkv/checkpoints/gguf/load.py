"""Models from GGUF files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from qkv.checkpoints.families import FAMILIES
from qkv.checkpoints.families.family import ConfigReader
from qkv.checkpoints.gguf.blocks import expand
from qkv.checkpoints.gguf.kinds import KINDS
from qkv.checkpoints.gguf.names import HuggingFace, to_huggingface
from qkv.checkpoints.gguf.reader import GGUFTensor, read_gguf
from qkv.checkpoints.maps import KeyMap, check_fit
from qkv.errors import ConfigError, FileError
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.shapes import Tensor


@final
@dataclass(frozen=True)
class Opened:
    """A file whose weights still lie as they are stored.

    Attributes:
        metadata: All of the file's, the vocabulary included.
        config: Of the model.
        keys: From `huggingface.state` to the model's tensors.
        huggingface: The tensors and their kinds.
    """

    metadata: dict[str, Any]
    config: TransformerConfig
    keys: KeyMap
    huggingface: HuggingFace


def open_gguf(path: Path) -> Opened:
    """The config of a GGUF file's model, and its weights as they are stored: mapped, blocks as rows of bytes.

    Raises:
        FileError: The file breaks a rule of the format, or holds what qkv does not know.
    """
    return _open(path, expanded=None)


def load_gguf(path: Path, *, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model of a GGUF file, on the CPU, all weights in `dtype`. Those stored in that type stay memory-mapped.

    Raises:
        FileError: As `open_gguf`, or the weights do not fit the config.
    """
    opened = _open(path, expanded=dtype)
    state = opened.huggingface.state
    for key, tensor in state.items():
        state[key] = tensor.to(dtype)
    model = _on_meta(opened.config, path)
    ours = opened.keys.to_ours(state, source=str(path))
    check_fit(ours, model.state_dict(), source=str(path))
    model.load_state_dict(ours, assign=True)
    return model.requires_grad_().eval()


def _open(path: Path, expanded: torch.dtype | None) -> Opened:
    file = read_gguf(path)

    def prepare(tensor: GGUFTensor) -> Tensor:
        """Plain numbers keep their type until the norms are what they should be."""
        if expanded is None or KINDS[tensor.kind].dtype:
            return tensor.data
        return expand(tensor.data, tensor.kind, expanded)

    made = to_huggingface(file, prepare)
    kind = made.config["model_type"]
    if kind not in FAMILIES:
        raise FileError(f"{path}: is a {kind!a} model, and qkv has no family of that name yet")
    try:
        config = FAMILIES[kind].read(ConfigReader(made.config, str(path)))
        return Opened(file.metadata, config, FAMILIES[kind].keys(config), made)
    except ConfigError as error:
        raise FileError(f"{path}: the model cannot be built: {error}") from None


def _on_meta(config: TransformerConfig, path: Path) -> Transformer:
    try:
        with torch.device("meta"):
            return config.build()
    except (ConfigError, RuntimeError, TypeError) as error:  # the latter two: sizes beyond what a tensor can have
        raise FileError(f"{path}: the model cannot be built: {str(error).splitlines()[0]}") from None
