"""A model that is ready to use: what `qkv.load` hands out, and the options by which it is read."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch

from qkv.data import Tokenizer
from qkv.data.tokenizer_files import has_tokenizer
from qkv.errors import ConfigError, FileError, KindError
from qkv.inspect import Inspection
from qkv.models.model import Model


class Ready(ABC):
    """Base of what `qkv.load` hands out: a model, with what reads and writes its texts.

    Attributes:
        what: What it is, for people.
        verbs: What can be done with it on the command line.
        model: In evaluation mode.
        facts: The `Facts` that are known of it besides; None: there are none.
    """

    what: ClassVar[str]
    verbs: ClassVar[str]
    model: Any
    facts: Any

    @property
    def config(self) -> Any:
        """What the model was built from."""
        return self.model.config

    if not TYPE_CHECKING:  # a checker would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            """Say whose a method is that other kinds of models have, and what there is instead."""
            whose = [kind.what for kind in _kinds(Ready) if not name.startswith("_") and hasattr(kind, name)]
            if not whose:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            raise KindError(f"{name} is for {' or '.join(whose)}, and this is {self.what}; use {self.verbs}")

    def check(self, source: Path) -> None:  # noqa: B027 - nothing to check is a good default
        """Raise `FileError` where what was read from `source` does not belong together."""

    def inspect(self, given: str, **how: Any) -> Inspection:
        """What the model attended to in a text or a picture, as `qkv inspect` draws it, with the options given.

        Raises:
            ConfigError: It has no attention to look at, or not in this way.
        """
        raise ConfigError(f"this is {self.what}, whose attention is not drawn; use {self.verbs}")

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """The files that `qkv.save` writes beside the weights and the config, by name."""


def _kinds(base: type[Ready]) -> Iterator[type[Ready]]:
    """The kinds of models, which have names for people."""
    for kind in base.__subclasses__():
        if hasattr(kind, "what") and not inspect.isabstract(kind):
            yield kind
        yield from _kinds(kind)


class Embeds(Ready, ABC):
    """Base of those that make vectors of what they read."""

    what = "a model that makes vectors of texts or pictures"
    verbs = "qkv embed"

    @abstractmethod
    def embed(self, inputs: Any, *, pool: Any = "own", unit: bool | None = None) -> Any:
        """A vector for each input, (N, D)."""


@final
@dataclass(frozen=True)
class Bare(Ready):
    """A model alone, of which nothing else is known."""

    what = "a model without tokenizers"
    verbs = "qkv show or check"

    model: Model
    facts: None = None

    def files(self) -> dict[str, bytes]:
        return {}


@final
@dataclass(frozen=True)
class Options:
    """How a checkpoint is read.

    Attributes:
        open: Opens another one, which this one belongs to.
        dtype: Type of the weights of a GGUF file; None: those that are packed stay so.
        allow_pickle: Also read weights that are pickled, with `weights_only`.
        above: The runs whose adapters belong to what is read.
    """

    open: Callable[[Path, "Options"], Ready]
    dtype: torch.dtype | None = None
    allow_pickle: bool = False
    above: tuple[Path, ...] = ()


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder; None where it has none. Raises `FileError` where it is damaged, or of another kind."""
    return Tokenizer.load(folder) if has_tokenizer(folder) else None


def check_vocabulary(tokenizer: Tokenizer | None, n: int | None, folder: Path) -> None:
    """Raise `FileError` where a tokenizer has more tokens than the model, `n`."""
    if tokenizer is not None and n is not None and tokenizer.vocab_size > n:
        raise FileError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model {n}; put the tokenizer there "
            "that belongs to the model"
        )
