"""`qkv check`."""

from typing import TYPE_CHECKING, Literal

from qkv.cli.opening import Whole

if TYPE_CHECKING:
    from qkv.models.model import ModelConfig

_MOST = 2 * 10**9  # parameters of a model that is built for a check


def check(model: str, /, *, dtype: Literal["float32", "float64", "bfloat16"] = "float32", seed: Whole = 0) -> int:
    """Ask a model about the laws: padding, packing, caching and the batch leave the answer unchanged.

    Exit code 1 where one is broken.

    Args:
        model: A run or a Hugging Face folder; or a preset, a config or a recipe, with fresh weights; also of pairs.
        dtype: Type of the weights.
        seed: Of fresh weights.
    """
    import torch

    from qkv.checkpoints.named import NAMED
    from qkv.cli.show import find_config
    from qkv.config import expand_home
    from qkv.errors import ConfigError
    from qkv.laws import check as ask
    from qkv.loading.layouts import load

    if expand_home(model).is_dir() or model.endswith(".gguf") or model in NAMED:
        built = load(model, dtype=getattr(torch, dtype)).model
    else:
        config = _closed(find_config(model))
        n = _size(config)
        if n > _MOST:
            raise ConfigError(
                f"{model} has {n:,} parameters; check one of at most {_MOST:,}, with fewer or narrower blocks"
            )
        torch.manual_seed(seed)
        built = config.build()
    report = ask(built.to(getattr(torch, dtype)))
    print(report)
    return 0 if report.holds else 1


def _size(config: "ModelConfig") -> int:
    """Parameters; those of a stack without building it, however deep it is."""
    import torch

    from qkv.cost import summary
    from qkv.models.transformer import TransformerConfig

    if isinstance(config, TransformerConfig):
        return summary(config).parameters
    with torch.device("meta"):
        return sum(p.numel() for p in config.build().parameters())


def _closed(config: "ModelConfig") -> "ModelConfig":
    """The config with sizes that a tokenizer or the data would set."""
    from dataclasses import replace

    from qkv.models.pairs import PairModelConfig
    from qkv.models.transformer import TransformerConfig
    from qkv.nn.embedders import TokenEmbedderConfig, VectorEmbedderConfig

    if isinstance(config, PairModelConfig):
        source, target = config.vocabularies
        return config.with_vocabularies(source or target or 256, target or source or 256, shared=source == target)
    if not isinstance(config, TransformerConfig):
        return config
    match config.embed:
        case TokenEmbedderConfig(vocab_size=None):
            return replace(config, embed=replace(config.embed, vocab_size=256))
        case VectorEmbedderConfig(n_features=None):
            return replace(config, embed=replace(config.embed, n_features=8))
    return config
