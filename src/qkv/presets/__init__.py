"""Known models as rows of plain data, by name."""

import dataclasses
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from qkv.errors import ConfigError, suggest
from qkv.masks import Causal, Window
from qkv.models.transformer import TransformerConfig
from qkv.presets.gemma2 import gemma2
from qkv.presets.gpt2 import gpt2
from qkv.presets.llama import llama
from qkv.presets.olmo2 import olmo2
from qkv.presets.pythia import pythia
from qkv.presets.small import small
from qkv.presets.translators import PAIR_PRESETS

PRESETS: dict[str, Callable[..., TransformerConfig]] = {
    "small": small,
    "gpt2": partial(gpt2, d_model=768, n_layers=12, n_heads=12),
    "gpt2-medium": partial(gpt2, d_model=1024, n_layers=24, n_heads=16),
    "gpt2-large": partial(gpt2, d_model=1280, n_layers=36, n_heads=20),
    "gpt2-xl": partial(gpt2, d_model=1600, n_layers=48, n_heads=25),
    "smollm2-135m": partial(
        llama,
        d_model=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        d_ff=1536,
        vocab_size=49_152,
        theta=1e5,
        context=8192,
        tied=True,
    ),
    "llama3-8b": partial(
        llama,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        d_ff=14_336,
        vocab_size=128_256,
        theta=5e5,
        context=8192,
    ),
    "mistral-7b": partial(
        llama,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        d_ff=14_336,
        vocab_size=32_000,
        theta=1e4,
        context=32_768,
        mask=Causal() & Window(size=4096),
    ),
    "qwen2.5-0.5b": partial(
        llama,
        d_model=896,
        n_layers=24,
        n_heads=14,
        n_kv_heads=2,
        d_ff=4864,
        vocab_size=151_936,
        theta=1e6,
        context=32_768,
        tied=True,
        eps=1e-6,
        qkv_bias=True,
    ),
    "qwen3-0.6b": partial(
        llama,
        d_model=1024,
        n_layers=28,
        n_heads=16,
        n_kv_heads=8,
        d_ff=3072,
        vocab_size=151_936,
        theta=1e6,
        context=40_960,
        tied=True,
        eps=1e-6,
        head_dim=128,
        qk_norm=True,
    ),
    "phi3-mini": partial(
        llama,
        d_model=3072,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        d_ff=8192,
        vocab_size=32_064,
        theta=1e4,
        context=4096,
        mask=Causal() & Window(size=2047),
    ),
    "gemma2-2b": partial(gemma2, d_model=2304, n_rounds=13, n_heads=8, n_kv_heads=4, head_dim=256, d_ff=9216),
    "olmo2-1b": partial(olmo2, d_model=2048, n_layers=16, n_heads=16, d_ff=8192),
    "pythia-160m": partial(pythia, d_model=768, n_layers=12, n_heads=12),
}


def preset(name: str, **changes: Any) -> Any:
    """The config of a known model, a language model's or one of pairs.

    Args:
        name: Such as `small`.
        changes: Its sizes, such as `vocab_size=100`, and whole parts of the config, such as `context=512`.

    Raises:
        ConfigError: There is no preset of that name, or it has nothing that is called so.
    """
    rows: dict[str, Callable[..., Any]] = {**PRESETS, **PAIR_PRESETS}
    if name not in rows:
        raise ConfigError(f"no preset {name!r}; {suggest(name, rows)}")
    row = rows[name]
    sizes = signature(row).parameters
    made = row(**{key: value for key, value in changes.items() if key in sizes})
    known = [*sizes, *(field.name for field in dataclasses.fields(made) if field.name not in sizes)]
    for key in changes:
        if key not in known:
            raise ConfigError(f"preset {name!r} has no {key!r}; {suggest(key, known)}")
    return dataclasses.replace(made, **{key: value for key, value in changes.items() if key not in sizes})
