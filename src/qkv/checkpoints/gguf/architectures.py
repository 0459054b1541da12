"""llama.cpp's architectures as data: what its metadata and tensors are in the layout of Hugging Face, and back.

Only what is llama.cpp's own stands here; what a model computes is said by the family of that `model_type`.
Source: llama.cpp's converters (`conversion/*.py`) and `gguf-py/gguf/constants.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, final

from qkv.checkpoints.families.family import ConfigReader
from qkv.checkpoints.maps import Operation, Permute, ShapeError, Split, Tensors, Transpose, fuse_qkv
from qkv.errors import FileError

Metadata: TypeAlias = dict[str, Any]


@final
@dataclass(frozen=True)
class Heads:
    """Sizes of the heads, which decide how rows are ordered."""

    d_model: int
    n_heads: int
    head_dim: int


@final
@dataclass(frozen=True)
class Shift(Operation):
    """Add a number: Gemma's norms multiply with 1 + weight, and llama.cpp stores the sum, in float32.

    The way back is exact where the sum was: for weights that bfloat16 holds, and sums from 0.5 up.
    """

    by: float

    def forward(self, theirs: Tensors) -> Tensors:
        """Add."""
        if not all(tensor.is_floating_point() for tensor in theirs):
            raise ShapeError("found quantised blocks, needs plain numbers")
        return tuple(tensor.float() + self.by for tensor in theirs)

    def inverse(self, ours: Tensors) -> Tensors:
        """Subtract."""
        return Shift(-self.by).forward(ours)


Operations: TypeAlias = Mapping[str, tuple[Operation, ...]]


def _nothing(heads: Heads) -> Operations:
    return {}


def _no_extra(source: ConfigReader, target: Metadata) -> None:
    pass


@final
@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        model_type: Hugging Face's name of the family.
        keys: Metadata (without the architecture's prefix) and the key of `config.json` that says the same.
        names: Tensors (without `.weight` and `.bias`) and their names there; `{}` is the layer.
        fixed: Keys of `config.json` that have only this value here.
        only: Likewise, and not worth writing into one.
        own_head_dim: Whether `config.json` says the width of a head; otherwise it is d_model / heads.
        partial: Whether a part of a head may be rotated; None: no rotation at all.
        operations: What happens to rows on the way to Hugging Face, by name.
        to_config: Adds what needs more than a table, from metadata to `config.json`.
        to_metadata: And back.
        harmless: Keys of `config.json` that need no place in the metadata.
        own_head: Whether llama.cpp demands a tensor for the head, also where it is the embedding table.
    """

    model_type: str
    keys: Mapping[str, str]
    names: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    own_head_dim: bool = False
    partial: bool | None = False
    operations: Callable[[Heads], Operations] = _nothing
    to_config: Callable[[ConfigReader, Metadata], None] = _no_extra
    to_metadata: Callable[[ConfigReader, Metadata], None] = _no_extra
    harmless: tuple[str, ...] = ()
    own_head: bool = False


_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_QKV = {f"blk.{{}}.attn_{name}": f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkv"}
_OUT = {"blk.{}.attn_output": "model.layers.{}.self_attn.o_proj"}
_GLU = {f"blk.{{}}.ffn_{name}": f"model.layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")}
_NORMS = {
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
}
_QK_NORMS = {f"blk.{{}}.attn_{name}_norm": f"model.layers.{{}}.self_attn.{name}_norm" for name in "qk"}
_LLAMA = _ENDS | _QKV | _OUT | _GLU | _NORMS
_DROPOUT = ("attention_dropout",)  # matters in training only
_NO_WINDOW = {"use_sliding_window": False}
_WINDOW_OFF = ("sliding_window", "max_window_layers", "layer_types")  # have no effect while it is off


def _interleave(heads: Heads) -> Operations:
    """From rotary pairs side by side to pairs half a head apart."""
    order = Permute((*range(0, heads.head_dim, 2), *range(1, heads.head_dim, 2)))
    return {f"blk.{{}}.attn_{name}": (order,) for name in "qk"}


def _gpt2_weights(heads: Heads) -> Operations:
    names = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    return {f"blk.{{}}.{name}.weight": (Transpose(),) for name in names}


def _neox_rows(heads: Heads) -> Operations:
    """From all q, all k, all v to q, k, v of each head."""
    fuse = fuse_qkv(heads.n_heads, heads.n_heads, heads.head_dim, heads.head_dim)
    return {"blk.{}.attn_qkv": (Split((heads.d_model,) * 3), fuse)}


def _neox_config(source: ConfigReader, config: Metadata) -> None:
    config["use_parallel_residual"] = source.take("use_parallel_residual", bool, True)


def _neox_metadata(source: ConfigReader, metadata: Metadata) -> None:
    metadata["use_parallel_residual"] = source.take("use_parallel_residual", bool, True)


_GEMMA_NORMS = {
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_GEMMA_27B = 46
"""Layers of the one model of Gemma 2 whose scores are scaled by d_model / heads; llama.cpp, too, knows it by them."""


def _gemma_shift(heads: Heads) -> Operations:
    return {name: (Shift(-1.0),) for name in (*_GEMMA_NORMS, "output_norm")}


def _gemma_scale(config: Metadata) -> int:
    width = config["hidden_size"] // config["num_attention_heads"]
    return width if config["num_hidden_layers"] == _GEMMA_27B else config["head_dim"]


def _gemma_types(n_layers: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(n_layers)]


def _gemma_config(source: ConfigReader, config: Metadata) -> None:
    config["sliding_window"] = source.take_positive("attention.sliding_window")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        config[key] = source.take(key, float)
    config["query_pre_attn_scalar"] = _gemma_scale(config)
    config["layer_types"] = _gemma_types(config["num_hidden_layers"])


def _gemma_metadata(source: ConfigReader, metadata: Metadata) -> None:
    metadata["attention.sliding_window"] = source.take_positive("sliding_window")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        metadata[key] = source.take(key, float)
    sizes = {key: metadata[name] for name, key in _SIZES.items()} | {"head_dim": metadata["attention.key_length"]}
    source.require("query_pre_attn_scalar", _gemma_scale(sizes))
    source.require("layer_types", _gemma_types(metadata["block_count"]))


def _phi_config(source: ConfigReader, config: Metadata) -> None:
    context = config["max_position_embeddings"]
    source.require("rope.scaling.original_context_length", context)
    config["original_max_position_embeddings"] = context
    config["sliding_window"] = source.take("attention.sliding_window", int, 0) or None


def _phi_metadata(source: ConfigReader, metadata: Metadata) -> None:
    source.require("original_max_position_embeddings", metadata["context_length"])
    metadata["rope.scaling.original_context_length"] = metadata["context_length"]
    metadata["attention.sliding_window"] = source.optional("sliding_window", int) or 0


ARCHITECTURES: Final[dict[str, Architecture]] = {
    "llama": Architecture(
        model_type="llama",
        keys=_SIZES,
        names=_LLAMA,
        fixed={"hidden_act": "silu"},
        own_head_dim=True,
        operations=_interleave,
        harmless=(*_DROPOUT, "attention_bias", "mlp_bias", "is_llama_config"),  # the tensors tell of biases
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        keys=_SIZES,
        names=_LLAMA,
        fixed={"hidden_act": "silu"} | _NO_WINDOW,
        harmless=(*_DROPOUT, *_WINDOW_OFF),
    ),
    "qwen3": Architecture(
        model_type="qwen3",
        keys=_SIZES,
        names=_LLAMA | _QK_NORMS,
        fixed={"hidden_act": "silu", "attention_bias": False} | _NO_WINDOW,
        own_head_dim=True,
        harmless=(*_DROPOUT, *_WINDOW_OFF),
    ),
    "gpt2": Architecture(
        model_type="gpt2",
        keys={
            "block_count": "n_layer",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        names={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
            "blk.{}.attn_norm": "transformer.h.{}.ln_1",
            "blk.{}.ffn_norm": "transformer.h.{}.ln_2",
            "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
            "blk.{}.attn_output": "transformer.h.{}.attn.c_proj",
            "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc",
            "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
        },
        fixed={"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
               "add_cross_attention": False},
        partial=None,
        operations=_gpt2_weights,
        harmless=("resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_activation",
                  "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    ),
    "gemma2": Architecture(
        model_type="gemma2",
        keys=_SIZES,
        names=_ENDS | _QKV | _OUT | _GLU | _GEMMA_NORMS,
        fixed={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
        own_head_dim=True,
        operations=_gemma_shift,
        to_config=_gemma_config,
        to_metadata=_gemma_metadata,
        only={"use_bidirectional_attention": False, "hidden_act": "gelu_pytorch_tanh"},
        harmless=(*_DROPOUT, "cache_implementation"),
    ),
    "phi3": Architecture(
        model_type="phi3",
        keys=_SIZES,
        names=_ENDS | _OUT | _NORMS | {
            "blk.{}.attn_qkv": "model.layers.{}.self_attn.qkv_proj",
            "blk.{}.ffn_up": "model.layers.{}.mlp.gate_up_proj",
            "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
        },
        fixed={"hidden_act": "silu"},
        partial=True,
        to_config=_phi_config,
        to_metadata=_phi_metadata,
        only={"attention_bias": False},
        harmless=(*_DROPOUT, "resid_pdrop", "embd_pdrop"),
    ),
    "olmo2": Architecture(
        model_type="olmo2",
        keys=_SIZES,
        names=_ENDS | _QKV | _OUT | _GLU | _QK_NORMS | {
            "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
            "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
        },
        fixed={"hidden_act": "silu", "attention_bias": False},
        harmless=(*_DROPOUT, "layer_types"),
        own_head=True,
    ),
    "gptneox": Architecture(
        model_type="gpt_neox",
        keys={name: key for name, key in _SIZES.items() if key not in ("rms_norm_eps", "num_key_value_heads")}
        | {"attention.layer_norm_epsilon": "layer_norm_eps"},
        names={
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
            "blk.{}.attn_norm": "gpt_neox.layers.{}.input_layernorm",
            "blk.{}.ffn_norm": "gpt_neox.layers.{}.post_attention_layernorm",
            "blk.{}.attn_qkv": "gpt_neox.layers.{}.attention.query_key_value",
            "blk.{}.attn_output": "gpt_neox.layers.{}.attention.dense",
            "blk.{}.ffn_up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
            "blk.{}.ffn_down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        },
        fixed={"hidden_act": "gelu", "attention_bias": True},
        partial=True,
        operations=_neox_rows,
        to_config=_neox_config,
        to_metadata=_neox_metadata,
        harmless=(*_DROPOUT, "hidden_dropout", "classifier_dropout", "is_decoder"),
        own_head=True,
    ),
}  # fmt: skip
"""By `general.architecture`."""


def architecture_of(metadata: Mapping[str, Any], source: str) -> tuple[str, Architecture]:
    """The name and the data of a file's architecture.

    Raises:
        FileError: It is not a whole language model, or one that qkv does not know.
    """
    name, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if kind != "model":
        raise FileError(f"{source}: general.type is {kind!a}; qkv reads models, so give the model's file")
    if metadata.get("split.count", 1) != 1:
        raise FileError(
            f"{source}: is one of {metadata['split.count']!a} parts; join them with llama-gguf-split --merge"
        )
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise FileError(f"{source}: general.architecture is {name!a}; qkv reads {known}; use another model")
    return name, ARCHITECTURES[name]
