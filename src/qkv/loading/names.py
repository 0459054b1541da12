"""From what a user calls a model to where it lies: paths, names of `qkv pull`, models of the Hugging Face hub."""

import re
from pathlib import Path

from qkv.checkpoints.named import NAMED, pull
from qkv.errors import FileError, suggest
from qkv.yaml_files import expand_home


def find(source: str | Path) -> Path:
    """The file or folder that a source of `qkv.load` stands for; downloads what has a name.

    Raises:
        FileError: There is no such thing.
    """
    path = expand_home(source)
    if path.exists():
        return path
    if str(source) in NAMED:
        return pull(str(source))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and (found := _from_hub(str(source))):
        return found
    raise FileError(
        f"{source}: there is no such file or folder; give a run, a Hugging Face folder, a GGUF file, or a name of "
        f"`qkv pull` ({suggest(str(source), NAMED)})"
    )


def _from_hub(name: str) -> Path | None:
    """A model of the hub in the hub's own cache; None where `huggingface_hub` is not installed."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return None
    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]  # never a pickle, never code
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the library, and what it is built on, raise a dozen types
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FileError(f"{name}: no such folder, and the hub does not give it ({reason}); check the name") from None
