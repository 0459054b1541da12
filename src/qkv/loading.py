"""Whatever can be loaded: a language model, or a translator."""

from pathlib import Path

import torch

from qkv import api
from qkv.loaded import Loaded
from qkv.translator import Translator, is_translator, load_translator


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
) -> Loaded | Translator:
    """A model with what reads and writes its texts: a `Translator` for a model of pairs, else a `Loaded`.

    Args:
        path: A run of `qkv train`, a folder in Hugging Face's layout, or a model of the package transly.
        device: Where the weights go.
        dtype: Type of the weights; None: that of the file.
        allow_pickle: Also read weights that are pickled (`pytorch_model.bin`), with `weights_only`.

    Raises:
        FileError: It is none of them, has no checkpoint yet, or does not fit together.
    """
    if is_translator(path):
        return load_translator(path, device=device, dtype=dtype)
    return api.load(path, device=device, dtype=dtype, allow_pickle=allow_pickle)
