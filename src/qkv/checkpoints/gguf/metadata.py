"""What a GGUF file says of a model besides its tensors: metadata to `config.json`, and back."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from qkv.checkpoints.families.config_reader import MAX_LAYERS, ConfigReader
from qkv.checkpoints.gguf.architectures import Architecture
from qkv.checkpoints.gguf.reader import GGUF
from qkv.errors import FileError
from qkv.nn.positions import (
    LinearScalingConfig,
    Llama3ScalingConfig,
    LongRoPEScalingConfig,
    RoPEConfig,
    YaRNScalingConfig,
)
from qkv.ops.rotary import frequencies
from qkv.shapes import Tensor

Factors: TypeAlias = Mapping[str, Tensor]

MAX_HEAD_DIM: Final = 1 << 16
ROPE_TENSORS: Final = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""The tensors with factors of the frequencies: of Llama 3; of LongRoPE."""
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
_SAID_ELSEWHERE = {
    "model_type", "architectures", "tie_word_embeddings", "attention_dropout", "attn_pdrop", "resid_pdrop",
    "embd_pdrop", "hidden_dropout", "rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_emb_base",
    "rotary_pct", "original_max_position_embeddings", "rope_parameters", "rope_local_base_freq",
}  # fmt: skip
"""Keys of `config.json` that matter in training only, or are written by way of the parts of the model."""


# --- from metadata to config.json -----------------------------------------------------------------------------------


def read_config(file: GGUF, name: str, architecture: Architecture, factors: Factors) -> dict[str, Any]:
    """What `config.json` would hold of a file with that architecture and those of `ROPE_TENSORS` that it has.

    Raises:
        FileError: A key is missing, not known, or contradicts another or the tensors.
    """
    prefix = f"{name}."
    own = {key.removeprefix(prefix): _short(value) for key, value in file.metadata.items() if key.startswith(prefix)}
    reader = ConfigReader(own, f"{file.path}, {name}")
    config: dict[str, Any] = {"model_type": architecture.model_type, **architecture.fixed}
    for ours, key in architecture.keys.items():
        config[key] = _take(reader, ours, config)
    config |= _read_shapes(file, reader, architecture, config[architecture.keys["embedding_length"]])
    head_dim = _read_head_dim(reader, architecture, head_dim_of(config, architecture))
    if architecture.own_head_dim:
        config["head_dim"] = head_dim
    config |= architecture.derived(config)
    kinds = config.get("layer_types", ())
    reader.require("attention.sliding_window_pattern", [kind == "sliding_attention" for kind in kinds])
    if architecture.rotated != "none":
        config["rope_parameters"] = _rope(reader, architecture, head_dim, factors, config)
    elif factors:
        raise FileError(f"{file.path}: {[*factors]} have no place in the architecture {name!a}; use another file")
    for key, value in _REQUIRED.items():
        reader.require(key, value)
    reader.finish(*_HARMLESS)
    return config


def _take(reader: ConfigReader, ours: str, config: Mapping[str, Any]) -> Any:
    """A value of metadata, in the type and with the default that llama.cpp has for it."""
    match ours:
        case "block_count":
            return reader.take_positive(ours, most=MAX_LAYERS)
        case "attention.head_count_kv":
            return reader.take_positive(ours, config["num_attention_heads"])
        case "attention.sliding_window":
            return reader.take(ours, int, 0) or None
        case "use_parallel_residual":
            return reader.take(ours, bool, True)
    return reader.take(ours, float) if ours.endswith(("epsilon", "softcapping")) else reader.take_positive(ours)


def _short(value: Any) -> Any:
    """A float32 as the shortest decimal number that gives it: 1e-5 is stored as 9.999999747e-06."""
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _read_shapes(file: GGUF, reader: ConfigReader, architecture: Architecture, d_model: int) -> dict[str, Any]:
    """What the tensors say beyond the metadata."""
    table = file.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2 or table.shape[1] != d_model:
        shape = None if table is None else table.shape
        raise FileError(f"{file.path}: 'token_embd.weight' is {shape} and must have rows of {d_model}; fix the file")
    reader.require("vocab_size", table.shape[0])
    made = {"vocab_size": table.shape[0], "tie_word_embeddings": "output.weight" not in file.tensors}
    if architecture.model_type == "llama":
        made["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        made["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    return made


def _read_head_dim(reader: ConfigReader, architecture: Architecture, width: int) -> int:
    said = reader.optional("attention.key_length", int)
    if said is None and architecture.own_head_dim:
        said = reader.optional("rope.dimension_count", int)  # older files say it by that alone
    head_dim = width if said is None else said
    least, most = (1, MAX_HEAD_DIM) if architecture.own_head_dim else (width, width)
    if not least <= head_dim <= most:
        raise FileError(f"{reader.source}: 'attention.key_length' is {head_dim} and must be from {least} to {most}")
    reader.require("attention.value_length", head_dim)
    return head_dim


def _rope(
    reader: ConfigReader, architecture: Architecture, head_dim: int, factors: Factors, config: dict[str, Any]
) -> dict[str, Any]:
    made: dict[str, Any] = {"rope_type": "default", "rope_theta": reader.take("rope.freq_base", float, 10_000.0)}
    if architecture.rotated == "part":
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
    if ROPE_TENSORS[0] in factors:
        made |= _llama3_of(factors[ROPE_TENSORS[0]], made, head_dim, reader.source)
    elif factors:
        made |= _longrope_of(factors, reader)
        config["original_max_position_embeddings"] = made["original_max_position_embeddings"]
    if not architecture.local_rope:
        return made
    own = architecture.local_rope == "own"
    local = reader.take("rope.freq_base_swa", float, 10_000.0) if own else made["rope_theta"]
    return {"full_attention": made, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _longrope_of(factors: Factors, reader: ConfigReader) -> dict[str, Any]:
    short, long = (factors.get(name) for name in ROPE_TENSORS[1:])
    if short is None or long is None or short.ndim != 1 or long.ndim != 1:
        raise FileError(f"{reader.source}: has one of {' and '.join(ROPE_TENSORS[1:])} and needs a list in both")
    return {
        "rope_type": "longrope",
        "short_factor": [_short(value) for value in short.float().tolist()],
        "long_factor": [_short(value) for value in long.float().tolist()],
        "attention_factor": reader.take("rope.scaling.attn_factor", float, 1.0),
        "original_max_position_embeddings": reader.take_positive("rope.scaling.original_context_length"),
    }


def _llama3_of(factors: Tensor, rope: Mapping[str, Any], head_dim: int, source: str) -> dict[str, Any]:
    """The settings whose factors these are. The file holds the factors alone; the rest is as in every Llama 3."""
    factor = float(factors.max()) if factors.is_floating_point() else 1.0
    made = _llama3_factors(Llama3ScalingConfig(factor=factor, original_length=8192), rope["rope_theta"], head_dim)
    if rope["rope_type"] != "default" or factors.shape != made.shape or not torch.allclose(factors.float(), made, 1e-4):
        raise FileError(
            f"{source}: {ROPE_TENSORS[0]!a} holds other factors of frequencies than Llama 3's; qkv has none such"
        )
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **more}


def _llama3_factors(scaling: Llama3ScalingConfig, theta: float, head_dim: int) -> Tensor:
    """By what the frequency of each pair is divided, in float32."""
    none = torch.zeros(1, 1, dtype=torch.long, device="cpu")
    return (frequencies(theta, head_dim, none.device) / scaling.frequencies(theta, head_dim, none)).float()


# --- from config.json to metadata -----------------------------------------------------------------------------------


def write_metadata(
    config: Mapping[str, Any], rope: object, local: object, architecture: Architecture, source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata, without the architecture's prefix, and the tensors with factors of the frequencies.

    Of a config as the family writes it, its rotary embedding, and that of layers with windows.

    Raises:
        FileError: llama.cpp would not compute what the config says.
    """
    left = {key: value for key, value in config.items() if key not in _SAID_ELSEWHERE}
    made: dict[str, Any] = {"vocab_size": left.pop("vocab_size")}
    head_dim = head_dim_of(config, architecture)
    size, context = left.get("sliding_window"), config[architecture.keys["context_length"]]
    if size is not None and "attention.sliding_window" not in architecture.keys:
        if size < context:
            raise FileError(f"{source}: 'sliding_window' is {size}, and llama.cpp computes this family without windows")
        del left["sliding_window"]
    if size is not None and size < context and architecture.model_type == "phi3":
        reason = f"without its windows, so texts of more than {size} tokens come out otherwise there"
        warnings.warn(f"{source}: llama.cpp computes this family {reason}", stacklevel=2)
    if architecture.own_head_dim:
        made |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
        left.pop("head_dim", None)
    for ours, key in architecture.keys.items():
        value = left.pop(key)
        made[ours] = 0 if value is None and ours == "attention.sliding_window" else value
        if made[ours] is None:
            raise FileError(f"{source}: {key!r} is None, and llama.cpp has {architecture.model_type} with one only")
    fixed = {**architecture.fixed, **architecture.derived({**config, "head_dim": head_dim})}
    for key, value in left.items():
        if value is not None and key not in architecture.harmless and value != fixed.get(key):
            found = "has another order" if isinstance(value, list) else f"is {value!r}"
            raise FileError(f"{source}: {key!r} {found}, which llama.cpp does not have for this family")
    factors = dict[str, Tensor]()
    if isinstance(rope, RoPEConfig):
        made |= {"rope.freq_base": rope.theta, "rope.dimension_count": rope.width(head_dim)}
        more, factors = _write_scaling(rope, head_dim, architecture, source)
        made |= more | _write_local(local, rope, architecture, source)
    return made, factors


def head_dim_of(config: Mapping[str, Any], architecture: Architecture) -> int:
    """The width of a head."""
    d_model, n_heads = (config[architecture.keys[key]] for key in ("embedding_length", "attention.head_count"))
    return config.get("head_dim", max(d_model // n_heads, 1))


def _write_local(local: object, rope: RoPEConfig, architecture: Architecture, source: str) -> dict[str, Any]:
    """What is said of the layers with windows."""
    own = architecture.local_rope == "own"
    there = RoPEConfig(theta=local.theta if own and isinstance(local, RoPEConfig) else rope.theta)
    if local != (there if architecture.local_rope else rope):
        raise FileError(f"{source}: layers with windows are rotated by {local}, and llama.cpp has {there} there")
    return {"rope.freq_base_swa": there.theta} if own else {}


def _write_scaling(
    rope: RoPEConfig, head_dim: int, architecture: Architecture, source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    match rope.scaling:
        case None:
            return {}, {}
        case LinearScalingConfig(factor=factor):
            return {"rope.scaling.type": "linear", "rope.scaling.factor": factor}, {}
        case YaRNScalingConfig() as yarn:
            usual = yarn.replace(attention_factor=None, truncate=True)
            if yarn.magnitude != usual.magnitude or not yarn.truncate:
                raise FileError(f"{source}: GGUF has no attention_factor of YaRN and always truncates; leave both out")
            return {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": yarn.factor,
                "rope.scaling.original_context_length": yarn.original_length,
                "rope.scaling.yarn_beta_fast": yarn.beta_fast,
                "rope.scaling.yarn_beta_slow": yarn.beta_slow,
            }, {}
        case Llama3ScalingConfig() if architecture.model_type == "llama":
            return {}, {ROPE_TENSORS[0]: _llama3_factors(rope.scaling, rope.theta, head_dim)}
        case LongRoPEScalingConfig() as long if architecture.model_type == "phi3":
            factors = (torch.tensor(values) for values in (long.short_factors, long.long_factors))
            return {
                "rope.scaling.attn_factor": long.attention_factor,
                "rope.scaling.original_context_length": long.original_length,
            }, dict(zip(ROPE_TENSORS[1:], factors, strict=True))
        case other:
            raise FileError(f"{source}: GGUF has no {other.tag()} for this family; it has linear and yarn")
