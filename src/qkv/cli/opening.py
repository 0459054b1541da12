"""How the verbs that run a model get it."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from qkv.loaded import Loaded

DType = Literal["float32", "bfloat16"]
Width = Literal["int8", "int4"]


def open_model(source: str, *, expand: DType | None = None, quantize: Width | None = None) -> "Loaded":
    """`qkv.load` with the options of the command line.

    Raises:
        ConfigError: Both options are given.
        FileError: There is no such model.
    """
    import torch

    from qkv.api import load
    from qkv.errors import ConfigError

    if expand is not None and quantize is not None:
        raise ConfigError(f"--expand {expand} and --quantize {quantize} exclude each other; give one of them")
    return load(source, dtype=None if expand is None else getattr(torch, expand), quantize=quantize)
