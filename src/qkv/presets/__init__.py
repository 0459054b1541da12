"""Known models as rows of plain data, by name."""

import dataclasses
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from qkv.errors import ConfigError, suggest
from qkv.masks import Causal, Window
from qkv.models.transformer import TransformerConfig
from qkv.presets.encoders import ENCODER_PRESETS
from qkv.presets.language import gemma2, gpt2, llama, olmo2, pythia, small
from qkv.presets.translators import PAIR_PRESETS
from qkv.presets.two_towers import TWO_TOWERS_PRESETS
from qkv.presets.vision import VISION_PRESETS

_SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "vocab_size", "theta", "context")
_LLAMAS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "smollm2-135m": ((576, 30, 9, 3, 1536, 49_152, 1e5, 8192), {"tied": True}),
    "llama3-8b": ((4096, 32, 32, 8, 14_336, 128_256, 5e5, 8192), {}),
    "mistral-7b": ((4096, 32, 32, 8, 14_336, 32_000, 1e4, 32_768), {"mask": Causal() & Window(size=4096)}),
    "phi3-mini": ((3072, 32, 32, 32, 8192, 32_064, 1e4, 4096), {"mask": Causal() & Window(size=2047)}),
    "qwen2.5-0.5b": (
        (896, 24, 14, 2, 4864, 151_936, 1e6, 32_768),
        {"tied": True, "eps": 1e-6, "qkv_bias": True},
    ),
    "qwen3-0.6b": (
        (1024, 28, 16, 8, 3072, 151_936, 1e6, 40_960),
        {"tied": True, "eps": 1e-6, "head_dim": 128, "qk_norm": True},
    ),
}

PRESETS: dict[str, Callable[..., TransformerConfig]] = {
    "small": small,
    "gpt2": partial(gpt2, d_model=768, n_layers=12, n_heads=12),
    "gpt2-medium": partial(gpt2, d_model=1024, n_layers=24, n_heads=16),
    "gpt2-large": partial(gpt2, d_model=1280, n_layers=36, n_heads=20),
    "gpt2-xl": partial(gpt2, d_model=1600, n_layers=48, n_heads=25),
    **{name: partial(llama, **dict(zip(_SIZES, row, strict=True)), **more) for name, (row, more) in _LLAMAS.items()},
    "gemma2-2b": partial(gemma2, d_model=2304, n_rounds=13, n_heads=8, n_kv_heads=4, head_dim=256, d_ff=9216),
    "olmo2-1b": partial(olmo2, d_model=2048, n_layers=16, n_heads=16, d_ff=8192),
    "pythia-160m": partial(pythia, d_model=768, n_layers=12, n_heads=12),
    **ENCODER_PRESETS,
}


def preset(name: str, **changes: Any) -> Any:
    """The config of a known model: of a language model, an encoder, a model of pairs, one of pictures, or one of both.

    Args:
        name: Such as `small`.
        changes: Its sizes, such as `vocab_size=100`, and whole parts of the config, such as `context=512`.

    Raises:
        ConfigError: There is no preset of that name, or it has nothing that is called so.
    """
    rows: dict[str, Callable[..., Any]] = {**PRESETS, **PAIR_PRESETS, **VISION_PRESETS, **TWO_TOWERS_PRESETS}
    if name not in rows:
        raise ConfigError(f"no preset {name!r}; {suggest(str(name), rows)}")
    sizes = signature(rows[name]).parameters
    made = rows[name](**{key: value for key, value in changes.items() if key in sizes})
    parts = {key: value for key, value in changes.items() if key not in sizes}
    known = dict.fromkeys([*sizes, *(field.name for field in dataclasses.fields(made))])
    for key in parts:
        if key not in known:
            raise ConfigError(f"preset {name!r} has no {key!r}; {suggest(key, known)}")
    return made.replace(**parts)
