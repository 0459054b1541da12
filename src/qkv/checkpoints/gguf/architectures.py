"""llama.cpp's architectures as data: what its metadata and tensors are in the layout of Hugging Face, and back.

Only what is llama.cpp's own stands here; what a model computes is said by the family of that `model_type`.
Source: llama.cpp's converters (`conversion/*.py`) and `gguf-py/gguf/constants.py`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, final

from qkv.checkpoints.maps import Operation, Permute, ShapeError, Split, Tensors, Transpose, fuse_qkv
from qkv.errors import FileError


@final
@dataclass(frozen=True)
class Shift(Operation):
    """Add a number: Gemma's norms multiply with 1 + weight, and llama.cpp stores the sum, in float32.

    The way back is exact where the sum was: for weights that bfloat16 holds, and sums from 0.5 up.
    """

    by: float

    def forward(self, theirs: Tensors) -> Tensors:
        if not all(tensor.is_floating_point() for tensor in theirs):
            raise ShapeError("found quantised blocks, needs plain numbers")
        return tuple(tensor.float() + self.by for tensor in theirs)

    def inverse(self, ours: Tensors) -> Tensors:
        return Shift(-self.by).forward(ours)


Operations: TypeAlias = Mapping[str, tuple[Operation, ...]]


@final
@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        model_type: Hugging Face's name of the family.
        keys: Metadata (without the architecture's prefix) and the key of `config.json` that says the same.
        names: Tensors (without `.weight` and `.bias`) and their names there; `{}` is the layer.
        fixed: Keys of `config.json` that have only this value here.
        harmless: Keys of `config.json` that need no place in the metadata.
        derived: Keys of `config.json` that follow from others.
        operations: From n_heads and head_dim, what happens to the rows of tensors on the way to Hugging Face, by name.
        rotated: Whether heads are rotated in whole, or a part of them may be.
        own_head_dim: Whether `config.json` says the width of a head; otherwise it is d_model / heads.
        head: When llama.cpp has a tensor for the head; "always": also where that is the embedding table.
        local_rope: Whether layers with windows are rotated without scaling, by a base of their own ("own") or that of
            the others ("same"); "": just as the others.
        windowed: The family that has windows in some layers under the same name, which only those tell apart.
    """

    model_type: str
    keys: Mapping[str, str]
    names: Mapping[str, str]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    derived: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    operations: Callable[[int, int], Operations] = lambda n_heads, head_dim: {}
    rotated: Literal["none", "whole", "part"] = "whole"
    own_head_dim: bool = False
    head: Literal["if untied", "always", "never"] = "if untied"
    local_rope: Literal["", "own", "same"] = ""
    windowed: "Architecture | None" = None


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
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_NO_WINDOW = {"use_sliding_window": False}
_WINDOW_OFF = ("sliding_window", "max_window_layers", "layer_types")  # have no effect while it is off


def _interleave(n_heads: int, head_dim: int) -> Operations:
    """From rotary pairs side by side to pairs half a head apart."""
    order = Permute((*range(0, head_dim, 2), *range(1, head_dim, 2)))
    return {f"blk.{{}}.attn_{name}": (order,) for name in "qk"}


def _gpt2_weights(n_heads: int, head_dim: int) -> Operations:
    names = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    return {f"blk.{{}}.{name}.weight": (Transpose(),) for name in names}


def _neox_rows(n_heads: int, head_dim: int) -> Operations:
    """From all q, all k, all v to q, k, v of each head."""
    fuse = fuse_qkv(n_heads, n_heads, head_dim, head_dim)
    return {"blk.{}.attn_qkv": (Split((n_heads * head_dim,) * 3), fuse)}


_GEMMA_NORMS = {
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}


def _gemma_shift(n_heads: int, head_dim: int) -> Operations:
    return {name: (Shift(-1.0),) for name in (*_GEMMA_NORMS, *_QK_NORMS, "output_norm")}


def _windows(config: Mapping[str, Any], every: int) -> dict[str, Any]:
    """Each so many-th layer has none."""
    n = config["num_hidden_layers"]
    return {"layer_types": ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(n)]}


def _gemma(every: int, largest: int) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What follows where each so many-th layer has no window.

    The model of so many layers, of 27 billion weights, scales scores by d_model / heads; llama.cpp, too, knows it so.
    """

    def derived(config: Mapping[str, Any]) -> dict[str, Any]:
        n, width = config["num_hidden_layers"], config["hidden_size"] // config["num_attention_heads"]
        return {"query_pre_attn_scalar": width if n == largest else config["head_dim"]} | _windows(config, every)

    return derived


_OLMO2 = Architecture(
    model_type="olmo2",
    keys=_SIZES,
    names=_ENDS | _QKV | _OUT | _GLU | _QK_NORMS | {
        "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
        "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
    },
    fixed={"hidden_act": "silu", "attention_bias": False},
    head="always",
)  # fmt: skip
_OLMO3 = dataclasses.replace(
    _OLMO2,
    model_type="olmo3",
    keys=_SIZES | {"attention.sliding_window": "sliding_window"},
    harmless=("sliding_window_pattern",),  # `layer_types` says it
    derived=functools.partial(_windows, every=4),
    local_rope="same",
)

ARCHITECTURES: Final[dict[str, Architecture]] = {
    "llama": Architecture(
        model_type="llama",
        keys=_SIZES,
        names=_LLAMA,
        fixed={"hidden_act": "silu"},
        operations=_interleave,
        own_head_dim=True,
        harmless=("attention_bias", "mlp_bias"),  # the tensors tell of biases
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        keys=_SIZES,
        names=_LLAMA,
        fixed={"hidden_act": "silu"} | _NO_WINDOW,
        harmless=_WINDOW_OFF,
    ),
    "qwen3": Architecture(
        model_type="qwen3",
        keys=_SIZES,
        names=_LLAMA | _QK_NORMS,
        fixed={"hidden_act": "silu", "attention_bias": False} | _NO_WINDOW,
        own_head_dim=True,
        harmless=_WINDOW_OFF,
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
        fixed={"activation_function": "gelu_new", "scale_attn_weights": True},
        operations=_gpt2_weights,
        rotated="none",
    ),
    "gemma": Architecture(
        model_type="gemma",
        keys=_SIZES,
        names=_LLAMA,
        fixed={"hidden_act": "gelu_pytorch_tanh", "attention_bias": False},
        operations=_gemma_shift,
        own_head_dim=True,
        head="never",
    ),
    "gemma2": Architecture(
        model_type="gemma2",
        keys=_SIZES | {"attention.sliding_window": "sliding_window"} | {key: key for key in _SOFTCAPS},
        names=_ENDS | _QKV | _OUT | _GLU | _GEMMA_NORMS,
        fixed={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
        harmless=("sliding_window_pattern",),  # `layer_types` says it
        derived=_gemma(every=2, largest=46),
        operations=_gemma_shift,
        own_head_dim=True,
        head="never",
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        keys=_SIZES | {"attention.sliding_window": "sliding_window"},
        names=_ENDS | _QKV | _OUT | _GLU | _GEMMA_NORMS | _QK_NORMS,
        fixed={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
        harmless=("sliding_window_pattern",),  # `layer_types` says it
        derived=_gemma(every=6, largest=62),
        operations=_gemma_shift,
        own_head_dim=True,
        local_rope="own",
    ),
    "phi3": Architecture(
        model_type="phi3",
        keys=_SIZES | {"attention.sliding_window": "sliding_window"},
        names=_ENDS | _OUT | _NORMS | {
            "blk.{}.attn_qkv": "model.layers.{}.self_attn.qkv_proj",
            "blk.{}.ffn_up": "model.layers.{}.mlp.gate_up_proj",
            "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
        },
        fixed={"hidden_act": "silu"},
        rotated="part",
    ),
    "olmo2": dataclasses.replace(_OLMO2, windowed=_OLMO3),
    "gptneox": Architecture(
        model_type="gpt_neox",
        keys={name: key for name, key in _SIZES.items() if key not in ("rms_norm_eps", "num_key_value_heads")}
        | {"attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
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
        operations=_neox_rows,
        rotated="part",
        head="always",
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
        n = metadata["split.count"]
        raise FileError(f"{source}: is one of {n!a} parts; join them with llama-gguf-split --merge")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise FileError(f"{source}: general.architecture is {name!a}; qkv reads {known}; use another model")
    found = ARCHITECTURES[name]
    return name, (found.windowed if metadata.get(f"{name}.attention.sliding_window") else None) or found
