"""What a GGUF file says of a model besides its tensors: metadata to `config.json`, and back."""

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from qkv.checkpoints.families.family import ConfigReader
from qkv.checkpoints.gguf.architectures import Architecture
from qkv.checkpoints.gguf.reader import GGUF
from qkv.errors import FileError
from qkv.shapes import Tensor

MAX_HEAD_DIM: Final = 1 << 16
ROPE_FACTORS: Final = "rope_freqs.weight"
"""The tensor with the factors of the frequencies."""
_HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length")
_REQUIRED: Final[dict[str, Any]] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
}
"""Metadata of any architecture that may have only this value."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3 has; the file holds only the factors that come of it."""


# --- from metadata to config.json -----------------------------------------------------------------------------------


def read_config(file: GGUF, name: str, architecture: Architecture, factors: Tensor | None) -> dict[str, Any]:
    """What `config.json` would hold.

    Args:
        file: Its metadata, and the shapes of its tensors.
        name: What the file calls the architecture.
        architecture: What is known of it.
        factors: The tensor of that name, if there is one.

    Raises:
        FileError: A key is missing, not known, or contradicts another or the tensors.
    """
    prefix = f"{name}."
    own = {key.removeprefix(prefix): _short(value) for key, value in file.metadata.items() if key.startswith(prefix)}
    reader = ConfigReader(own, f"{file.path}, {name}")
    config: dict[str, Any] = {"model_type": architecture.model_type, **architecture.fixed}
    for ours, key in architecture.keys.items():
        if key == "num_key_value_heads":
            config[key] = reader.take_positive(ours, config["num_attention_heads"])
        else:
            config[key] = reader.take(ours, float) if ours.endswith("epsilon") else reader.take_positive(ours)
    _check_sizes(file, reader, architecture, config)
    head_dim = _read_head_dim(reader, architecture, config)
    if architecture.own_head_dim:
        config["head_dim"] = head_dim
    architecture.to_config(reader, config)
    if architecture.partial is not None:
        config["rope_parameters"] = _rope(reader, architecture, head_dim, factors)
    elif factors is not None:
        raise FileError(f"{file.path}: {ROPE_FACTORS!a} has no place in the architecture {name!a}; use another file")
    for key, value in _REQUIRED.items():
        reader.require(key, value)
    reader.finish(*_HARMLESS)
    return config


def _short(value: Any) -> Any:
    """A float32 as the shortest decimal number that gives it: 1e-5 is stored as 9.999999747e-06."""
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _check_sizes(file: GGUF, reader: ConfigReader, architecture: Architecture, config: dict[str, Any]) -> None:
    """What the tensors say beyond the metadata, and that nothing is larger than they are."""
    sizes = {ours: config[key] for ours, key in architecture.keys.items()}
    if sizes["block_count"] > len(file.tensors):
        n = len(file.tensors)
        raise FileError(f"{file.path}: asks for {sizes['block_count']} layers and has {n} tensors; mend the file")
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2 or table.shape[1] != sizes["embedding_length"]:
        shape = None if table is None else table.shape
        width = sizes["embedding_length"]
        raise FileError(f"{file.path}: 'token_embd.weight' is {shape} and must have rows of {width}; mend the file")
    config["vocab_size"] = table.shape[0]
    reader.require("vocab_size", table.shape[0])
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    if architecture.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors


def _read_head_dim(reader: ConfigReader, architecture: Architecture, config: dict[str, Any]) -> int:
    sizes = {ours: config[key] for ours, key in architecture.keys.items()}
    width = max(sizes["embedding_length"] // sizes["attention.head_count"], 1)
    # Where a whole head is rotated, older files say its width by that alone.
    said = reader.optional("attention.key_length", int)
    if said is None and architecture.own_head_dim:
        said = reader.optional("rope.dimension_count", int)
    head_dim = width if said is None else said
    if head_dim > MAX_HEAD_DIM:
        raise FileError(f"{reader.source}: heads of {head_dim} are wider than any ({MAX_HEAD_DIM}); mend the file")
    reader.require("attention.value_length", head_dim)
    if head_dim < 1 or (head_dim != width and not architecture.own_head_dim):
        raise FileError(f"{reader.source}: 'attention.key_length' is {head_dim} and must be {width}; mend the file")
    return head_dim


def _rope(reader: ConfigReader, architecture: Architecture, head_dim: int, factors: Tensor | None) -> dict[str, Any]:
    made: dict[str, Any] = {"rope_type": "default", "rope_theta": reader.take("rope.freq_base", float, 10_000.0)}
    if architecture.partial:
        rotated = reader.take_positive("rope.dimension_count", head_dim)
        share = rotated / head_dim
        made["partial_rotary_factor"] = share if int(share * head_dim) == rotated else math.nextafter(share, 1.0)
    else:
        reader.require("rope.dimension_count", head_dim)
    kind = reader.take("rope.scaling.type", str, "none")
    if kind not in ("none", "linear", "yarn"):
        raise FileError(f"{reader.source}: 'rope.scaling.type' is {kind!a}; qkv reads none, linear and yarn")
    if kind != "none":
        made |= {"rope_type": kind, "factor": reader.take("rope.scaling.factor", float)}
    if kind == "yarn":
        made["original_max_position_embeddings"] = reader.take_positive("rope.scaling.original_context_length")
        for key in ("beta_fast", "beta_slow"):
            made |= {key: value} if (value := reader.optional(f"rope.scaling.yarn_{key}", float)) is not None else {}
    if factors is not None:
        made |= _llama3_of(factors, made, head_dim, reader.source)
    return made


def _llama3_of(factors: Tensor, rope: Mapping[str, Any], head_dim: int, source: str) -> dict[str, Any]:
    """The settings whose factors these are."""
    guess = {"rope_type": "llama3", "factor": float(factors.max()) if factors.is_floating_point() else 1.0, **_LLAMA3}
    made = _llama3_factors(guess | {"rope_theta": rope["rope_theta"]}, head_dim)
    if rope["rope_type"] != "default" or factors.shape != made.shape or not torch.allclose(factors.float(), made, 1e-4):
        raise FileError(
            f"{source}: {ROPE_FACTORS!a} holds other factors of frequencies than Llama 3's; qkv has none such"
        )
    return guess


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """By what Llama 3.1's scaling divides the frequency of each pair, in float32."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / -head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - keep) / rope["factor"] + keep)).float()


# --- from config.json to metadata -----------------------------------------------------------------------------------


def write_metadata(reader: ConfigReader, architecture: Architecture) -> tuple[dict[str, Any], Tensor | None]:
    """The metadata, without the architecture's prefix, and the factors of the frequencies where there are some.

    Raises:
        FileError: llama.cpp would not compute what the config says.
    """
    made: dict[str, Any] = {}
    for ours, key in architecture.keys.items():
        if ours.endswith("epsilon"):
            made[ours] = reader.take(key, float)
        else:
            made[ours] = reader.take_positive(key, _default(ours, made))
    made["vocab_size"] = reader.take_positive("vocab_size")
    head_dim = made["embedding_length"] // made["attention.head_count"]
    if architecture.own_head_dim:
        head_dim = reader.take_positive("head_dim", head_dim)
        made |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    architecture.to_metadata(reader, made)
    factors = None if architecture.partial is None else _write_rope(reader, architecture, made, head_dim)
    for key, value in {**architecture.fixed, **architecture.only, "sliding_window": None}.items():
        if key not in architecture.harmless:
            reader.require(key, value)
    reader.finish(*architecture.harmless)
    return made, factors


def _default(ours: str, made: Mapping[str, Any]) -> int | None:
    """Of a count that a config may leave out."""
    if ours == "attention.head_count_kv":
        return made["attention.head_count"]
    return 4 * made["embedding_length"] if ours == "feed_forward_length" else None


def head_dim_of(metadata: Mapping[str, Any]) -> int:
    """The width of a head, from metadata as `write_metadata` makes it."""
    return metadata.get("attention.key_length", metadata["embedding_length"] // metadata["attention.head_count"])


def _write_rope(reader: ConfigReader, architecture: Architecture, made: dict[str, Any], head_dim: int) -> Tensor | None:
    rope = ConfigReader(_rope_parameters(reader), f"{reader.source}, rope")
    made["rope.freq_base"] = rope.take("rope_theta", float, 10_000.0)
    share = rope.take("partial_rotary_factor", float, 1.0)
    if share != 1.0 and not architecture.partial:
        raise FileError(f"{rope.source}: 'partial_rotary_factor' is {share}, which llama.cpp has not for this family")
    made["rope.dimension_count"] = int(head_dim * share)
    kind = rope.take("rope_type", str, "default")
    if kind == "llama3" and architecture.model_type == "llama":
        values = {key: rope.take(key, float) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        values["original_max_position_embeddings"] = rope.take_positive("original_max_position_embeddings")
        rope.finish()
        return _llama3_factors(values | {"rope_theta": made["rope.freq_base"]}, head_dim)
    if kind not in ("default", "linear", "yarn"):
        raise FileError(f"{rope.source}: GGUF has no scaling {kind!a} for this family; it has linear and yarn")
    if kind != "default":
        made |= {"rope.scaling.type": kind, "rope.scaling.factor": rope.take("factor", float)}
    if kind == "yarn":
        made["rope.scaling.original_context_length"] = rope.take_positive("original_max_position_embeddings")
        for key in ("beta_fast", "beta_slow"):
            made |= {f"rope.scaling.yarn_{key}": value} if (value := rope.optional(key, float)) is not None else {}
    rope.finish()
    return None


def _rope_parameters(reader: ConfigReader) -> dict[str, Any]:
    """In the newer layout, whichever the config has."""
    newer, older = reader.optional("rope_parameters", dict), reader.optional("rope_scaling", dict)
    theta = reader.optional("rope_theta", float)
    made: dict[str, Any] = dict(newer or older or {})
    if "type" in made:
        made.setdefault("rope_type", made.pop("type"))
        made.pop("type", None)
    if theta is not None:
        made.setdefault("rope_theta", theta)
    return made
