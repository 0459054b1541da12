"""`qkv check`."""

from typing import Literal

from qkv.cli.opening import Whole

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
    from qkv.cost import parameters
    from qkv.errors import ConfigError
    from qkv.laws import check as ask
    from qkv.loading.layouts import load
    from qkv.yaml_files import expand_home

    if expand_home(model).is_dir() or model.endswith(".gguf") or model in NAMED:
        built = load(model, dtype=getattr(torch, dtype)).model
    else:
        config = find_config(model).closed()
        n = parameters(config)
        if n > _MOST:
            raise ConfigError(
                f"{model} has {n:,} parameters; check one of at most {_MOST:,}, with fewer or narrower blocks"
            )
        torch.manual_seed(seed)
        built = config.build()
    report = ask(built.to(getattr(torch, dtype)))
    print(f"{report}\n\n{report.legend}")
    return 0 if report.holds else 1
