"""`qkv.load`, the one door for users, and the layouts of checkpoints that it opens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, get_args

import torch

from qkv.checkpoints import peft
from qkv.errors import ConfigError, FileError
from qkv.loading.building import to_type
from qkv.loading.foreign import open_gguf_file, open_hugging_face, open_peft, open_transly, read_gguf_config
from qkv.loading.names import find
from qkv.loading.reader import Reader
from qkv.loading.ready import Options, Ready
from qkv.loading.run import RECIPE, open_run, read_run_config
from qkv.loading.saved import MODEL, open_saved
from qkv.models.model import ModelConfig
from qkv.nn.quantised import Width, is_packed, quantise

R = TypeVar("R", bound=Ready)


class Layout(NamedTuple):
    """One way in which a model lies on the disk.

    Attributes:
        mark: The file by which its folder is known; empty: it is a single file.
        name: What it is, for people.
        open: The model, from its folder or file.
        read_config: The model's config alone; None: it takes the whole model.
    """

    mark: str
    name: str
    open: Callable[[Path, Options], Ready]
    read_config: Callable[[Path], ModelConfig] | None = None


LAYOUTS: Final = (
    Layout(peft.CONFIG, "adapters of PEFT", open_peft),
    Layout("config.json", "Hugging Face", open_hugging_face),
    Layout(MODEL, "qkv.save", open_saved),
    Layout("model.h5", "transly", open_transly),
    Layout(RECIPE, "a run", open_run, read_run_config),  # behind those beside which a recipe may lie
    Layout("", "GGUF", open_gguf_file, read_gguf_config),
)
"""Tried in this order."""


def load(
    source: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    quantize: Width | None = None,
    allow_pickle: bool = False,
) -> Any:
    """A model with what reads and writes its texts, ready to use.

    Args:
        source: A run of `qkv train` (its newest whole checkpoint), a folder of `qkv.save`, a folder in Hugging Face's
            layout, a folder of PEFT's adapters, a GGUF file, the name of weights that `qkv pull` knows, a model on the
            Hugging Face hub as owner/name (with `huggingface_hub` installed), or a trained model of the
            package transly.
        device: Where the weights go.
        dtype: Type of the weights. None: that of the file; four-bit weights of a GGUF file stay packed.
        quantize: Pack the weights of a language model or an encoder in memory: int8 with a scale for each row, int4
            with one for each 32 neighbours, or w8a8, which is int8 and rounds what they are multiplied with as well:
            for encoders, which read many tokens at once.
        allow_pickle: Also read weights that are pickled (`pytorch_model.bin`), with `weights_only`.

    Returns:
        A `Loaded`; for a model of pairs a `Translator`, or a `Bare` if it has no tokenizers; for a run what its task
        hands out, which may be an object of the task's own.

    Raises:
        ConfigError: Options that exclude each other, or that the model does not have.
        FileError: The source is none of these, has no checkpoint yet, or does not fit together.
    """
    if quantize not in (None, *get_args(Width)):
        raise ConfigError(f"quantize={quantize!r} is unknown; give one of {', '.join(get_args(Width))}")
    to_type(torch.nn.LayerNorm(1), dtype, device)  # refuses them before weights are read
    elsewhere = not str(device).startswith("cpu")  # where nothing is packed
    if quantize is not None and (dtype is not None or elsewhere):
        raise ConfigError(f"quantize={quantize!r} is for the CPU and sets the dtype; leave dtype and device out")
    wanted = torch.bfloat16 if dtype is None and elsewhere else dtype
    ready = _open(find(source), Options(_open, wanted, allow_pickle))
    to_type(ready.model, dtype, device)
    if quantize is not None:
        if not isinstance(ready, Reader):
            raise ConfigError(
                f"quantize={quantize!r} is for language models and encoders and {source} is {ready.what}; leave it out"
            )
        if is_packed(ready.model):
            raise ConfigError(f"{source}: its weights are packed already; leave quantize out")
        quantise(ready.model, quantize)
    return ready


def load_as(kind: type[R], source: str | Path, *, dtype: torch.dtype | None = None, quantize: Width | None = None) -> R:
    """What `load` hands out, where only one kind of it is of use.

    Raises:
        ConfigError: It is of another kind; or as `load`.
        FileError: As `load`.
    """
    ready = load(source, dtype=dtype, quantize=quantize)
    if not isinstance(ready, kind):
        raise ConfigError(f"{source} is {ready.what} and this is for {kind.what}; use {ready.verbs}")
    return ready


def load_plain(source: str | Path, say: Callable[[str], None]) -> Any:
    """As `load`, with packed weights expanded to float32, which `say` is told."""
    ready = load(source)
    if not is_packed(ready.model):
        return ready
    say(f"{source}: its packed weights are expanded to float32")
    return load(source, dtype=torch.float32)


def config_of(source: str | Path) -> ModelConfig:
    """The config of a model that `load` would hand out, by the shortest way; a run needs no checkpoint for that.

    Raises:
        FileError: As `load`.
    """
    layout, path = _recognise(find(source))
    if layout.read_config is not None:
        return layout.read_config(path)
    return layout.open(path, Options(_open)).config


def _open(path: Path, options: Options) -> Ready:
    layout, path = _recognise(path)
    ready = layout.open(path, options)
    ready.check(path)
    return ready


def _recognise(path: Path) -> tuple[Layout, Path]:
    """The layout, and where it begins: a file by which a folder is known stands for the folder."""
    if path.is_file() and any(path.name == layout.mark for layout in LAYOUTS):
        path = path.parent
    for layout in LAYOUTS:
        if (path / layout.mark).is_file():
            return layout, path
    if not path.is_dir():
        raise FileError(f"{path}: there is no such folder; give a run or a folder in Hugging Face's layout")
    marks = " nor ".join(f"{layout.mark} ({layout.name})" for layout in LAYOUTS if layout.mark)
    raise FileError(f"{path}: has neither {marks}; give a folder with one of them")
