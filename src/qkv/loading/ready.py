"""A model that is ready to use: what `qkv.load` hands out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from qkv.data import Tokenizer
from qkv.errors import FileError
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

    def check(self, source: Path) -> None:  # noqa: B027 - nothing to see is a good default
        """See that what was read from a file or folder belongs together; here there is nothing to see.

        Raises:
            FileError: It does not.
        """

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """The files that `qkv.save` writes beside the weights and the config, by name."""


@final
@dataclass(frozen=True)
class Bare(Ready):
    """A model alone, of which nothing else is known."""

    what = "a model without tokenizers"
    verbs = "qkv show or check"

    model: Model
    facts: None = None

    def files(self) -> dict[str, bytes]:
        """There are none."""
        return {}


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder; None where it has none.

    Raises:
        FileError: It is damaged.
    """
    return Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None


def check_vocabulary(tokenizer: Tokenizer | None, n: int | None, folder: Path) -> None:
    """Refuse a tokenizer with more tokens than the model; None: there is no tokenizer, or no vocabulary.

    Raises:
        FileError: It has more than `n`.
    """
    if tokenizer is not None and n is not None and tokenizer.vocab_size > n:
        raise FileError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model {n}; put the tokenizer there "
            "that belongs to the model"
        )
