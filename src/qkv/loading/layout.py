"""What a layout of a checkpoint is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch

from qkv.loading.ready import Ready
from qkv.models.model import ModelConfig


@final
@dataclass(frozen=True)
class Options:
    """How a checkpoint is read.

    Attributes:
        open: Opens another one, which this one sits on.
        dtype: Type of the weights of a GGUF file; None: those that are packed stay so.
        allow_pickle: Also read weights that are pickled, with `weights_only`.
        above: The runs whose adapters sit on what is read.
    """

    open: "Callable[[Path, Options], Ready]"
    dtype: torch.dtype | None = None
    allow_pickle: bool = False
    above: tuple[Path, ...] = field(default=())


@final
@dataclass(frozen=True)
class Layout:
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

    def recognises(self, path: Path) -> bool:
        """Whether a folder or file is in this layout, as far as its names say."""
        return (path / self.mark).is_file()
