"""`qkv.load`, the one door for users: a language model, or a translator."""

from pathlib import Path

import torch

from qkv.api import Width, load_language_model
from qkv.errors import ConfigError
from qkv.loaded import Loaded
from qkv.translator import Translator, is_translator, load_translator


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: Width | None = None,
    allow_pickle: bool = False,
) -> Loaded | Translator:
    """A model with what reads and writes its texts: a `Translator` for a model of pairs, else a `Loaded`.

    Args:
        source: A run of `qkv train`, a folder in Hugging Face's layout or ours, a folder of PEFT's adapters, a GGUF
            file, the name of weights that `qkv pull` knows, a model on the Hugging Face hub as owner/name, or a
            trained model of the package transly.
        device: Where the weights go.
        dtype: Type of the weights. None: that of the file; four-bit weights of a GGUF file stay packed.
        quantize: Pack the weights of a language model in memory, as in `load_language_model`.
        allow_pickle: Also read weights that are pickled (`pytorch_model.bin`), with `weights_only`.

    Raises:
        ConfigError: Options that exclude each other, or that the model does not have.
        FileError: The source is none of these, has no checkpoint yet, or does not fit together.
    """
    if not is_translator(source):
        return load_language_model(source, device=device, dtype=dtype, quantize=quantize, allow_pickle=allow_pickle)
    if quantize is not None:
        raise ConfigError(f"quantize={quantize!r} is for language models and {source} is a translator; leave it out")
    return load_translator(source, device=device, dtype=dtype)
