"""Texts with a class each: sources, ids, and batches without padding."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch

from qkv.config import Config, config
from qkv.data.batches import Batch, Batches
from qkv.data.sources import TEXT_SUFFIXES, decode_text, files_below, read_bytes, records, text_in
from qkv.errors import FileError
from qkv.tokens import Tokens
from qkv.yaml_files import expand_home


class Labelled(NamedTuple):
    """A text and the name of its class."""

    text: str
    label: str


@config
class LabelledSourceConfig(Config, ABC):
    """A corpus of texts with classes in a fixed order, the same every time it is read."""

    @abstractmethod
    def items(self) -> Iterator[Labelled]:
        """Each text with its class.

        Raises:
            FileError: Something is missing, unreadable or not what it should be.
        """


@final
@config
class LabelledFilesConfig(LabelledSourceConfig):
    """The user's own: .csv, .jsonl or .json files with a text and its class in each row, line or item.

    Attributes:
        path: A file, a folder, a pattern, or several of these.
        field: The column or key of the text.
        label: That of the class.
    """

    path: str | tuple[str, ...]
    field: str = "text"
    label: str = "label"

    def items(self) -> Iterator[Labelled]:
        for path in files_below(self.path, (".csv", ".json", ".jsonl")):
            if (found := records(path)) is None:
                raise FileError(f"{path}: is no table; give a .csv, .jsonl or .json file with texts and their classes")
            for record, where in found:
                yield Labelled(_text(record, self.field, "field", where), _text(record, self.label, "label", where))


@final
@config
class ClassFoldersConfig(LabelledSourceConfig):
    """The user's own: a folder with a folder for each class, in which each .txt or .md file is a text.

    Attributes:
        path: The folder.
    """

    path: str

    def items(self) -> Iterator[Labelled]:
        folder = expand_home(self.path)
        classes = sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []
        if not classes:
            raise FileError(f"{folder}: holds no folders; give one with a folder of texts for each class")
        for each in classes:
            for path in files_below(str(each), TEXT_SUFFIXES):
                yield Labelled(_not_empty(decode_text(read_bytes(path), str(path)), str(path)), each.name)


def _text(record: dict[str, object], key: str, setting: str, where: str) -> str:
    """What stands under a key, a whole number or truth value as text."""
    value = record.get(key)
    if isinstance(value, bool | int):
        return str(value)
    return _not_empty(text_in(record, key, where, setting).strip(), f"{where}: {key!r}")


def _not_empty(text: str, where: str) -> str:
    if not text.strip():
        raise FileError(f"{where} is empty; fill it in, or leave the text out")
    return text


# --- ids --------------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, eq=False)
class LabelledSplit:
    """Documents, one after the other, and the class of each.

    Attributes:
        values: Token ids, (n_tokens,).
        offsets: Where each document begins, and the end of the last; (n_documents + 1,).
        labels: The number of the class of each; (n_documents,).
    """

    values: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]], labels: Sequence[int]) -> "LabelledSplit":
        """From the ids of each document."""
        values = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in documents])
        return cls(values, np.cumsum([0, *map(len, documents)]), np.asarray(labels, dtype=np.int64))

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """A hash of ids and classes."""
        digest = hashlib.sha256(self.offsets.tobytes())
        digest.update(self.values.tobytes() + self.labels.tobytes())
        return digest.hexdigest()

    def ids(self, i: int) -> np.ndarray:
        """Those of a document."""
        return self.values[self.offsets[i] : self.offsets[i + 1]]


@final
class LabelledBatches(Batches):
    """The batches of labelled documents: those of a batch stand side by side in one row, so that nothing is padded.

    Targets are (documents,), the number of the class of each.

    Args:
        split: The documents.
        context: Tokens of the longest.
        batch_size: Documents of a batch.
        seed, shuffle: See `Batches`.
    """

    def __init__(self, split: LabelledSplit, *, context: int, batch_size: int, seed: int, shuffle: bool) -> None:
        super().__init__(context=context, batch_size=batch_size, seed=seed, shuffle=shuffle)
        self._split = split

    @property
    def n_rows(self) -> int:
        """Number of documents."""
        return self._split.n_documents

    def rows(self, epoch: int, first: int, end: int) -> Batch:
        order = np.arange(self.n_rows)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
        numbers = order[first:end].tolist()
        ids = [self._split.ids(i) for i in numbers]
        inputs = torch.from_numpy(np.concatenate(ids))[None]
        return Batch(
            inputs, torch.from_numpy(self._split.labels[numbers]), Tokens.packed([[len(each) for each in ids]])
        )
