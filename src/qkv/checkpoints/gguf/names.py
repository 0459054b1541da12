"""A GGUF file in the layout of Hugging Face, and back: names of tensors, order of rows."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from qkv.checkpoints.families.family import ConfigReader
from qkv.checkpoints.gguf.architectures import ARCHITECTURES, Architecture, Heads, architecture_of
from qkv.checkpoints.gguf.kinds import KINDS, GGUFTensor
from qkv.checkpoints.gguf.metadata import ROPE_FACTORS, head_dim_of, read_config, write_metadata
from qkv.checkpoints.gguf.reader import GGUF
from qkv.checkpoints.maps import KeyMap, Rule
from qkv.errors import FileError
from qkv.shapes import Tensor

_MODEL_TYPES: Final = {data.model_type: name for name, data in ARCHITECTURES.items()} | {"mistral": "llama"}


@final
@dataclass(frozen=True)
class HuggingFace:
    """A model as `transformers` lays it out.

    Attributes:
        config: What `config.json` would hold.
        state: Tensors by Hugging Face's names. Blocks stay rows of bytes, in uint8; where Hugging Face has a weight
            transposed (GPT-2) they are a transposed view of those rows.
        kinds: A name from `KINDS` for each tensor.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    kinds: dict[str, str]


def to_huggingface(file: GGUF) -> HuggingFace:
    """The config and the tensors of a file as Hugging Face names and orders them.

    Args:
        file: From `read_gguf`.

    Raises:
        FileError: An architecture, key or tensor that qkv does not know.
    """
    source = str(file.path)
    name, architecture = architecture_of(file.metadata, source)
    tensors = dict(file.tensors)
    factors = tensors.pop(ROPE_FACTORS, None)
    config = read_config(file, name, architecture, None if factors is None else factors.data)
    n_layers = config[architecture.keys["block_count"]]
    pairs = _pairs(architecture, tensors, n_layers, side=0)
    kinds = {theirs: tensors[ours].kind for ours, theirs in pairs if ours in tensors}
    state = {key: tensor.data for key, tensor in tensors.items()}
    keys = _key_map(architecture, pairs, _heads(architecture, config))
    return HuggingFace(config, keys.to_ours(state, source=source), kinds)


def from_huggingface(model: HuggingFace, *, source: str = "the model") -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensors of a GGUF file from a model in Hugging Face's layout: the inverse of `to_huggingface`.

    Args:
        model: Plain tensors are of F32, F16 or BF16 by their dtype; `kinds` says so of blocks.
        source: What errors call it.

    Raises:
        FileError: llama.cpp has no such family, or would not compute what the config says.
    """
    reader = ConfigReader(model.config, source)
    model_type = reader.take("model_type", str)
    if model_type not in _MODEL_TYPES:
        raise FileError(f"{source}: qkv writes no GGUF of {model_type!a}; it can for {', '.join(sorted(_MODEL_TYPES))}")
    name = _MODEL_TYPES[model_type]
    architecture = ARCHITECTURES[name]
    state = dict(model.state)
    _settle_head(architecture, reader, state)
    metadata, factors = write_metadata(reader, architecture)
    sizes = {key: metadata[ours] for ours, key in architecture.keys.items()}
    heads = Heads(metadata["embedding_length"], metadata["attention.head_count"], head_dim_of(metadata))
    pairs = _pairs(architecture, state, sizes[architecture.keys["block_count"]], side=1)
    kinds = {ours: _kind_of(model, theirs) for ours, theirs in pairs if theirs in state}
    made = _key_map(architecture, pairs, heads).to_theirs(state, source=source)
    tensors = {key: _wrap(kinds[key], tensor) for key, tensor in made.items()}
    if factors is not None:
        tensors[ROPE_FACTORS] = GGUFTensor("F32", tuple(factors.shape), factors)
    general = {"general.architecture": name, "general.type": "model", "general.quantization_version": 2}
    return general | {f"{name}.{key}": value for key, value in metadata.items()}, tensors


# --- tensors --------------------------------------------------------------------------------------------------------


def _pairs(architecture: Architecture, present: Collection[str], n_layers: int, side: int) -> list[tuple[str, str]]:
    """(llama.cpp's name, Hugging Face's) for all layers, of the tensors that one side has in the first layer.

    Raises:
        FileError: There are fewer tensors than that. (So no list is longer than what a file holds.)
    """
    bases = [(f"{a}.{part}", f"{b}.{part}") for a, b in architecture.names.items() for part in ("weight", "bias")]
    there = [base for base in bases if base[side].replace("{}", "0") in present]
    layered = [base for base in there if "{}" in base[0]]
    if len(layered) * n_layers > len(present):
        raise FileError(
            f"the model needs {len(layered)} tensors in each of {n_layers} layers and has {len(present)} in all; "
            "use the config that belongs to these weights"
        )
    flat = [base for base in there if "{}" not in base[0]]
    return flat + [(a.replace("{}", str(i)), b.replace("{}", str(i))) for i in range(n_layers) for a, b in layered]


def _key_map(architecture: Architecture, pairs: list[tuple[str, str]], heads: Heads) -> KeyMap:
    operations = architecture.operations(heads)

    def rule(ours: str, theirs: str) -> Rule:
        pattern = ".".join("{}" if part.isdigit() else part for part in ours.split("."))
        return Rule(ours, theirs, *operations.get(pattern, operations.get(pattern.rpartition(".")[0], ())))

    return KeyMap([rule(*pair) for pair in pairs], n_layers=0)


def _kind_of(model: HuggingFace, key: str) -> str:
    dtypes = {kind.dtype: name for name, kind in KINDS.items() if kind.dtype}
    dtype = model.state[key].dtype
    kind = dtypes.get(dtype) if dtype != torch.uint8 else model.kinds.get(key)
    if kind is None:
        raise FileError(f"the tensor {key!a} is of {dtype}, which GGUF does not hold; convert it first")
    return kind


def _wrap(name: str, tensor: Tensor) -> GGUFTensor:
    kind = KINDS[name]
    kept = tensor if kind.dtype is None or tensor.dtype == kind.dtype else tensor.to(kind.dtype)
    return GGUFTensor(name, kind.shape(tensor.shape), kept)


def _settle_head(architecture: Architecture, reader: ConfigReader, state: dict[str, Tensor]) -> None:
    """A tied head is written only where llama.cpp demands it."""
    head, table = (architecture.names[name] + ".weight" for name in ("output", "token_embd"))
    if reader.take("tie_word_embeddings", bool, architecture.model_type in ("gpt2", "gemma2")):
        state.pop(head, None)
        if architecture.own_head and table in state:
            state[head] = state[table]


def _heads(architecture: Architecture, config: Mapping[str, Any]) -> Heads:
    d_model, n_heads = (config[architecture.keys[key]] for key in ("embedding_length", "attention.head_count"))
    return Heads(d_model, n_heads, config.get("head_dim", max(d_model // n_heads, 1)))
