"""Models from GGUF files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from qkv.checkpoints.families import FAMILIES
from qkv.checkpoints.families.family import ConfigReader
from qkv.checkpoints.gguf.blocks import INT4, expand, int4_groups
from qkv.checkpoints.gguf.kinds import KINDS
from qkv.checkpoints.gguf.names import HuggingFace, to_huggingface
from qkv.checkpoints.gguf.reader import GGUFTensor, read_gguf
from qkv.checkpoints.maps import KeyMap, check_fit
from qkv.checkpoints.tensors import give_back
from qkv.errors import ConfigError, FileError
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.nn.quantised import HalfLinear, Int4Linear
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


def load_gguf(path: Path, *, dtype: torch.dtype | None = None) -> Transformer:
    """The model of a GGUF file, on the CPU.

    Args:
        path: The file.
        dtype: Type of all weights; those stored in it stay memory-mapped. None: four-bit weights stay packed, other
            matrices become float16 and the rest float32 (a file without blocks keeps its own types). PyTorch has no
            product for the blocks of Q8_0, Q6_K, Q5_0 and Q5_1, and ours none for a fused projection whose parts are
            of different kinds: those are the others.

    Raises:
        FileError: As `open_gguf`, or the weights do not fit the config.
    """
    return load_with_metadata(path, dtype=dtype)[0]


def load_with_metadata(path: Path, *, dtype: torch.dtype | None = None) -> tuple[Transformer, dict[str, Any]]:
    """`load_gguf`, and the file's metadata."""
    opened = _open(path, expanded=dtype)
    return _load(opened, path, dtype), opened.metadata


def _load(opened: Opened, path: Path, dtype: torch.dtype | None) -> Transformer:
    model, state = _on_meta(opened.config, path), opened.huggingface.state
    if dtype is None:
        return _packed(opened, model, path)
    for key, tensor in state.items():
        state[key] = tensor.to(dtype)
    return _filled(model, opened.keys.to_ours(state, source=str(path)), path)


def _packed(opened: Opened, model: Transformer, path: Path) -> Transformer:
    """The model with its matrices packed: four bits where they have them, else float16."""
    state, kinds = opened.huggingface.state, opened.huggingface.kinds
    if all(KINDS[kind].dtype for kind in kinds.values()):
        return _filled(model, opened.keys.to_ours(state, source=str(path)), path)
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    four: dict[str, str] = {}
    for rule in opened.keys.rules:
        used = {kinds[key] for key in rule.theirs if key in kinds}
        if len(used) == 1 and used <= INT4 and set(rule.ours) <= linear:
            four |= dict.fromkeys(rule.ours, used.pop())
            continue
        for key in set(rule.theirs) & state.keys():
            state[key] = _expanded(state[key], kinds[key], set(rule.ours) <= linear | _TABLES)
    ours = opened.keys.to_ours(state, source=str(path))
    for name in (linear | _TABLES) & ours.keys():
        owner = model.get_submodule(name.removesuffix(".weight"))
        weight, bias = ours.pop(name), ours.pop(name.removesuffix("weight") + "bias", None)
        made = Int4Linear(*int4_groups(weight, four[name]), bias) if name in four else HalfLinear(weight, bias)
        if (needed := owner.weight.shape) != (made.out_features, made.in_features):
            raise FileError(f"{path}: {name!r} is {made.out_features} x {made.in_features}, the model needs {needed}")
        if isinstance(owner, nn.Linear):
            above, _, last = name.removesuffix(".weight").rpartition(".")
            setattr(model.get_submodule(above), last, made)
        else:
            del owner.weight
            owner.weight = made
    return _filled(model, ours, path).requires_grad_(requires_grad=False)


_TABLES = {"embed.weight", "head.weight"}


def _filled(model: Transformer, ours: dict[str, Tensor], path: Path) -> Transformer:
    """The model with the weights that it lacks."""
    rest = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_meta}
    check_fit(ours, rest, source=str(path))
    model.load_state_dict(ours, assign=True, strict=False)
    return model.requires_grad_().eval()


def _expanded(tensor: Tensor, kind: str, matrix: bool) -> Tensor:
    """In float16 where it is a matrix of a product, else in float32."""
    dtype = torch.float16 if matrix and tensor.ndim == 2 else torch.float32
    turned = tensor.ndim == 2 and tensor.stride(1) != 1  # GPT-2's blocks are a transposed view of rows of bytes
    rows = tensor.T if turned else tensor
    made = expand(rows, kind, dtype)
    if made.data_ptr() != rows.data_ptr():
        give_back((rows,))
    return made.T if turned else made


def _open(path: Path, expanded: torch.dtype | None) -> Opened:
    file = read_gguf(path)

    def prepare(tensor: GGUFTensor) -> Tensor:
        """Plain numbers keep their type until the norms are what they should be."""
        if expanded is None or KINDS[tensor.kind].dtype:
            return tensor.data
        made = expand(tensor.data, tensor.kind, expanded)
        give_back((tensor.data,))
        return made

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
