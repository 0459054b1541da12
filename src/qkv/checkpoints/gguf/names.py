"""A GGUF file in the layout of Hugging Face, and back: names of tensors, order of rows."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from qkv.checkpoints.families import FAMILIES, Family, family_of
from qkv.checkpoints.families.family import layers_of, sublayer
from qkv.checkpoints.gguf.architectures import ARCHITECTURES, Architecture, architecture_of
from qkv.checkpoints.gguf.kinds import KINDS, GGUFTensor
from qkv.checkpoints.gguf.metadata import ROPE_TENSORS, head_dim_of, read_config, write_metadata
from qkv.checkpoints.gguf.reader import GGUF
from qkv.checkpoints.maps import KeyMap, Rule
from qkv.errors import ConfigError, FileError
from qkv.models.transformer import TransformerConfig
from qkv.nn.attention import AttentionConfig
from qkv.shapes import Tensor

_NAMES: Final = {
    data.model_type: (name, data)
    for name, first in ARCHITECTURES.items()
    for data in (first, first.windowed)
    if data is not None
} | {"mistral": ("llama", ARCHITECTURES["llama"])}


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

    Raises:
        FileError: An architecture, key or tensor that qkv does not know.
    """
    source = str(file.path)
    name, architecture = architecture_of(file.metadata, source)
    tensors = dict(file.tensors)
    factors = {key: tensors.pop(key).data for key in ROPE_TENSORS if key in tensors}
    config = read_config(file, name, architecture, factors)
    keys = _key_map(architecture, config, tensors, side=0)
    kinds = {rule.ours[0]: tensors[rule.theirs[0]].kind for rule in keys.rules if rule.theirs[0] in tensors}
    state = {key: tensor.data for key, tensor in tensors.items()}
    return HuggingFace(config, keys.to_ours(state, source=source), kinds)


def from_huggingface(model: HuggingFace, *, source: str = "the model") -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensors of a GGUF file from a model in Hugging Face's layout: the inverse of `to_huggingface`.

    Args:
        model: Plain tensors are of F32, F16 or BF16 by their dtype; `kinds` says so of blocks.
        source: What errors call it.

    Raises:
        FileError: llama.cpp has no such family, or would not compute what the config says.
    """
    model_type = model.config.get("model_type")
    if model_type not in _NAMES:
        raise FileError(f"{source}: qkv writes no GGUF of {model_type!a}; it can for {', '.join(sorted(_NAMES))}")
    family, (name, architecture) = FAMILIES[model_type], _NAMES[model_type]
    config = family.parse(model.config, source)
    said = family.write(config)
    attentions = [sublayer(block, 0, AttentionConfig) for block in layers_of(config)]
    full = next((one for one in attentions if one.mask.reach is None), attentions[0])
    local = next((one for one in attentions if one.mask.reach is not None), full)
    metadata, factors = write_metadata(said, full.position, local.position, architecture, source)
    tied = said["tie_word_embeddings"]
    if architecture.head == "never" and not tied:
        raise FileError(
            f"{source}: has a head of its own, and llama.cpp has {model_type} with the embedding table alone"
        )
    state = _with_head(model.state, architecture, tied=tied)
    keys = _key_map(architecture, said, state, side=1)
    kinds = {rule.theirs[0]: _kind_of(rule.ours[0], state, model.kinds) for rule in keys.rules if rule.ours[0] in state}
    made = keys.to_theirs(state, source=source)
    tensors = {key: _tensor(kinds[key], data) for key, data in made.items()}
    tensors |= {key: _tensor("F32", data) for key, data in factors.items()}
    general = {"general.architecture": name, "general.type": "model", "general.quantization_version": 2}
    return general | {f"{name}.{key}": value for key, value in metadata.items()}, tensors


def family_for_gguf(config: TransformerConfig, source: str) -> Family:
    """The first family that expresses a model in a way that llama.cpp computes.

    Raises:
        ConfigError: No family can express it.
        FileError: llama.cpp computes none of those that can; the message says why.
    """
    refusal = None
    for name in _NAMES:
        try:
            family = family_of(config, name)
            from_huggingface(HuggingFace(family.write(config), {}, {}), source=source)  # only to see whether it can
        except ConfigError:
            continue
        except FileError as error:
            refusal = refusal or error
        else:
            return family
    raise refusal or ConfigError(f"{source}: no family that llama.cpp has can express this model; write another layout")


# --- tensors --------------------------------------------------------------------------------------------------------


def _key_map(architecture: Architecture, config: Mapping[str, Any], present: Collection[str], side: int) -> KeyMap:
    """The map of the tensors that one side has in the first layer.

    Raises:
        FileError: There are fewer tensors than that. (So no list is longer than what a file holds.)
    """
    n_layers, n_heads = (config[architecture.keys[key]] for key in ("block_count", "attention.head_count"))
    operations = architecture.operations(n_heads, head_dim_of(config, architecture))
    rules = [
        Rule(f"{ours}.{part}", f"{theirs}.{part}", *operations.get(f"{ours}.{part}", operations.get(ours, ())))
        for ours, theirs in architecture.names.items()
        for part in ("weight", "bias")
        if f"{(ours, theirs)[side]}.{part}".replace("{}", "0") in present
    ]
    layered = sum("{}" in rule.theirs[0] for rule in rules)
    if layered * n_layers > len(present):
        raise FileError(
            f"the model needs {layered} tensors in each of {n_layers} layers and has {len(present)} in all; "
            "use the config that belongs to these weights"
        )
    return KeyMap(rules, n_layers)


def _kind_of(key: str, state: Mapping[str, Tensor], kinds: Mapping[str, str]) -> str:
    plain = {kind.dtype: name for name, kind in KINDS.items() if kind.dtype}
    dtype = state[key].dtype
    kind = plain.get(dtype) if dtype != torch.uint8 else kinds.get(key)
    if kind is None:
        raise FileError(f"the tensor {key!a} is of {dtype}, which GGUF does not hold; convert it first")
    return kind


def _tensor(kind: str, data: Tensor) -> GGUFTensor:
    """In the type of its kind: Gemma's operations are done in float32."""
    data = data.to(KINDS[kind].dtype or data.dtype)
    return GGUFTensor(kind, KINDS[kind].shape(data.shape), data)


def _with_head(state: Mapping[str, Tensor], architecture: Architecture, *, tied: bool) -> dict[str, Tensor]:
    """A tied head is written only where llama.cpp demands it."""
    head, table = (architecture.names[name] + ".weight" for name in ("output", "token_embd"))
    if not tied:
        return dict(state)
    kept = {key: tensor for key, tensor in state.items() if key != head}
    return kept | {head: kept[table]} if architecture.head == "always" and table in kept else kept
