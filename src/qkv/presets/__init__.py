"""Known models as rows of plain data, by name."""

from collections.abc import Callable

from qkv.errors import ConfigError, suggest
from qkv.models.transformer import TransformerConfig
from qkv.presets.gpt2 import gpt2
from qkv.presets.llama import llama
from qkv.presets.small import small

PRESETS: dict[str, Callable[[], TransformerConfig]] = {
    "small": small,
    "gpt2": lambda: gpt2(d_model=768, n_layers=12, n_heads=12),
    "gpt2-medium": lambda: gpt2(d_model=1024, n_layers=24, n_heads=16),
    "gpt2-large": lambda: gpt2(d_model=1280, n_layers=36, n_heads=20),
    "gpt2-xl": lambda: gpt2(d_model=1600, n_layers=48, n_heads=25),
    "smollm2-135m": lambda: llama(
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
    "llama3-8b": lambda: llama(
        d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14_336, vocab_size=128_256, theta=5e5, context=8192
    ),
}


def preset(name: str) -> TransformerConfig:
    """The config of a known model.

    Raises:
        ConfigError: There is no preset of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; {suggest(name, PRESETS)}")
    return PRESETS[name]()
