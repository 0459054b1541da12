"""Texts or pictures, each with a class, classes or a number: sources, and batches without padding."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F

from qkv.config import Config, config
from qkv.data.augment import AugmentationConfig, Examples
from qkv.data.batches import Batch, Batches
from qkv.data.packing import even_batches
from qkv.data.reads import Read, without_padding
from qkv.data.sources import TEXT_SUFFIXES, decode_text, files_below, read_bytes, records, text_in, value_in
from qkv.errors import FileError
from qkv.shapes import Tensor
from qkv.yaml_files import expand_home

Holds = Literal["texts", "words", "pictures", "vectors"]


class Labelled(NamedTuple):
    """An item, what is said of it, and where that stands.

    Attributes:
        item: A text, its words, a picture (channels, height, width) in uint8, or a series (T, features) in float32.
        label: As its source has it: the name of a class, a number, or a list.
        where: What errors call the label.
    """

    item: Any
    label: Any
    where: str = "the data: a class"


@config
class LabelledSourceConfig(Config, ABC):
    """A corpus of items with classes in a fixed order, the same every time it is read."""

    holds: ClassVar[Holds] = "texts"
    """What the items are."""

    @abstractmethod
    def items(self) -> Iterator[Labelled]:
        """Each item with its class.

        Raises:
            FileError: Something is missing, unreadable or not what it should be.
        """

    def notes(self) -> Iterable[str]:
        """What to say about the corpus before it is read; here nothing."""
        return ()


@final
@config
class LabelledFilesConfig(LabelledSourceConfig):
    """The user's own: .csv, .jsonl or .json files with a text and its class, or number, in each row, line or item.

    Attributes:
        path: A file, a folder, a pattern, or several of these.
        field: The column or key of the text.
        label: That of the class, the number, or the list of classes.
    """

    path: str | tuple[str, ...]
    field: str = "text"
    label: str = "label"

    def items(self) -> Iterator[Labelled]:
        for path in files_below(self.path, (".csv", ".json", ".jsonl")):
            if (found := records(path)) is None:
                raise FileError(f"{path}: is no table; give a .csv, .jsonl or .json file with texts and their classes")
            for record, where in found:
                label = value_in(record, self.label, where, "label")
                yield Labelled(_text(record, self.field, where), label, f"{where}: {self.label!r}")


@final
@config
class ClassFoldersConfig(LabelledSourceConfig):
    """The user's own: a folder with a folder for each class, in which each .txt or .md file is a text.

    Attributes:
        path: The folder.
    """

    path: str

    def items(self) -> Iterator[Labelled]:
        for path, label in class_folders(self.path, TEXT_SUFFIXES):
            yield Labelled(_not_empty(decode_text(read_bytes(path), str(path)), str(path)), label)

    def notes(self) -> Iterator[str]:
        return hidden_folders(self.path)


def class_folders(path: str, suffixes: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """The files with one of the suffixes in the folders of a folder, each with the name of its own folder.

    Folders whose names begin with a dot are left out.

    Raises:
        FileError: There are no folders, or one has no such file.
    """
    folder = expand_home(path)
    classes = [each for each in _folders_in(folder) if not each.name.startswith(".")]
    if not classes:
        raise FileError(f"{folder}: holds no folders; give one with a folder for each class")
    for each in classes:
        for file in files_below(str(each), suffixes):
            yield file, each.name


def hidden_folders(path: str) -> Iterator[str]:
    """What to say of the folders that `class_folders` leaves out."""
    hidden = [each.name for each in _folders_in(expand_home(path)) if each.name.startswith(".")]
    if hidden:
        yield f"{path}: left out {', '.join(hidden)}; a folder whose name begins with a dot is no class"


def _folders_in(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []


def _text(record: dict[str, object], key: str, where: str) -> str:
    """The text under a key, a whole number or truth value as text."""
    value = record.get(key)
    if isinstance(value, bool | int):
        return str(value)
    return _not_empty(text_in(record, key, where).strip(), f"{where}: {key!r}")


def _not_empty(text: str, where: str) -> str:
    if not text.strip():
        raise FileError(f"{where} is empty; fill it in, or leave the text out")
    return text


# --- batches ----------------------------------------------------------------------------------------------------------


@final
class LabelledBatches(Batches):
    """The batches of labelled items: nothing is padded (see `without_padding`).

    In training each item is in one batch of an epoch, and batches have about as many tokens each (see `even_batches`).

    Args:
        items: Each as numbers: ids, or the pixels of a picture; or what `np.asarray` makes these of, such as a file.
        targets: What each has, (items, …), or what each token of each has, (tokens,). Those of pictures that are mixed
            become the shares of the classes.
        read: What a model reads of one.
        lengths: Tokens of each; None: all are of one length.
        augment: What varies pictures in training, one after the other.
        n_classes: How many there are; for mixing.
        context: Tokens of the longest.
        batch_size: Items of a batch.
        seed, shuffle: See `Batches`.
    """

    def __init__(
        self,
        items: Sequence[Any],
        targets: Tensor | Sequence[Tensor],
        read: Callable[[np.ndarray], Read],
        *,
        lengths: Sequence[int] | None = None,
        augment: Sequence[AugmentationConfig] = (),
        n_classes: int = 0,
        context: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        super().__init__(context=context, batch_size=1, seed=seed, shuffle=shuffle)  # a batch is one row of its items
        self._items, self._targets, self._read = items, targets, read
        self._lengths = np.array(lengths or [1] * len(items))
        self._augment, self._n_classes, self._n = augment, n_classes, batch_size
        self._latest = (-1, self._plan(0))

    @property
    def n_rows(self) -> int:
        """Number of batches."""
        return -(-len(self._items) // self._n)

    def _plan(self, epoch: int) -> list[np.ndarray]:
        """The numbers of the items of each batch."""
        if self.shuffle:
            return even_batches(self._lengths, self._n, np.random.default_rng([self.seed, epoch]))
        return [np.arange(len(self._items))[at : at + self._n] for at in range(0, len(self._items), self._n)]

    def rows(self, epoch: int, first: int, end: int) -> Batch:
        latest = self._latest
        if latest[0] != epoch:
            self._latest = latest = (epoch, self._plan(epoch))
        numbers = latest[1][first].tolist()
        items = [np.asarray(self._items[i]) for i in numbers]
        if not isinstance(self._targets, Tensor):
            inputs, tokens = without_padding([self._read(item) for item in items])
            return Batch(inputs, torch.cat([self._targets[i] for i in numbers]).view(tokens.valid.shape), tokens)
        targets = self._targets[numbers]
        if self._augment:
            if any(each.mixes for each in self._augment) and not targets.is_floating_point():
                targets = F.one_hot(targets, self._n_classes).float()
            generators = [np.random.default_rng([self.seed, epoch, i]) for i in numbers]
            examples = Examples(items, targets.numpy())
            for each in self._augment:
                examples = each.apply(examples, generators)
            items, targets = examples.pictures, torch.from_numpy(examples.targets)
        inputs, tokens = without_padding([self._read(item) for item in items])
        return Batch(inputs, targets, tokens)
