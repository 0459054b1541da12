"""GGUF files, read with distrust: every count is checked against the bytes that are there before anything is allocated.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file is mapped; the data of a tensor is read
when it is used.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch

from qkv.checkpoints.files import check_name, map_file, quote, reading
from qkv.checkpoints.gguf.kinds import ARRAY, KINDS, NAMES, NUMBERS, OTHERS, STRING, GGUFTensor, alignment_of

MAX_HEADER: Final = 64 << 20  # bytes; the largest vocabularies take 16 MB
MAX_ITEMS: Final = 1 << 21  # in all arrays of a file together: they cost time; 262,144 tokens with merges are 1.3 M
MAX_KEYS: Final = 10_000
MAX_TENSORS: Final = 20_000

_U64 = struct.Struct("<Q").unpack_from


@final
@dataclass(frozen=True)
class GGUF:
    """A file.

    Attributes:
        path: Where it is.
        metadata: Numbers, bools, strings, and lists of one kind of those.
        tensors: By name, in the order of the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUF:
    """All of a GGUF file of version 2 or 3, its tensors memory-mapped.

    Raises:
        FileError: The file is missing, or breaks a rule of the format; the message names the field.
    """
    with reading(path):
        mapped = map_file(path)
        cursor = _Cursor(mapped)
        if mapped[:4] != b"GGUF":
            raise ValueError("does not begin with 'GGUF', so it is no GGUF file")
        cursor.skip(4, "the magic")
        (version,) = cursor.unpack("I", "the version")
        if version not in (2, 3):
            found = "is big-endian" if version >> 24 else f"has version {version}"
            raise ValueError(f"{found}, and qkv reads 2 and 3 in little-endian order")
        n_tensors = cursor.count("the number of tensors", 24, MAX_TENSORS)
        metadata = _metadata(cursor, cursor.count("the number of keys", 13, MAX_KEYS))
        infos = _infos(cursor, n_tensors)
        alignment = alignment_of(metadata)
        begin = cursor.at + -cursor.at % alignment
        _check_places(infos, alignment, len(mapped) - begin)
        return GGUF(path, metadata, {name: _tensor(mapped, begin, *info) for name, info in infos.items()})


@final
class _Cursor:
    """Reads one value after the other, and none beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = memoryview(data)
        self.at = 0
        self._end = min(len(data), MAX_HEADER)
        self._items = MAX_ITEMS

    def skip(self, count: int, what: str) -> int:
        """Where the next `count` bytes begin."""
        if count > self._end - self.at:
            limit = "the file ends" if self._end < MAX_HEADER else "a header may end at the latest"
            raise ValueError(f"{limit} at byte {self._end}, and {what} would take {count} bytes from byte {self.at} on")
        self.at += count
        return self.at - count

    def unpack(self, form: str, what: str) -> tuple[int, ...]:
        return struct.unpack_from(f"<{form}", self.data, self.skip(struct.calcsize(f"<{form}"), what))

    def count(self, what: str, at_least: int, at_most: int) -> int:
        """A number of things that take `at_least` bytes each."""
        (count,) = self.unpack("Q", what)
        if count > at_most or count * at_least > self._end - self.at:
            raise ValueError(f"{what} is {count}, more than {min(at_most, (self._end - self.at) // at_least)}")
        return count

    def strings(self, count: int, what: str) -> list[str]:
        data, at, end, made = self.data, self.at, self._end, []
        for _ in range(count):
            if at + 8 > end:
                self.skip(end + 1 - self.at, what)
            start = at + 8
            at = start + _U64(data, at)[0]
            if at > end:
                self.skip(at - self.at, what)
            made.append(str(data[start:at], "utf-8"))
        self.at = at
        return made

    def values(self, kind: int, count: int, what: str) -> list[Any]:
        if kind == STRING:
            return self.strings(count, what)
        if kind not in NUMBERS:
            raise ValueError(f"{what} has the unknown type {kind}")
        dtype = NUMBERS[kind]
        start = self.skip(count * dtype.itemsize, what)
        found = np.frombuffer(self.data, np.uint8 if dtype.kind == "b" else dtype, count, start)
        if dtype.kind == "b" and (found > 1).any():
            raise ValueError(f"{what} is {found.max()} and must be 0 or 1")
        return found.astype(dtype, copy=False).tolist()

    def value(self, what: str) -> Any:
        (kind,) = self.unpack("I", what)
        if kind != ARRAY:
            (value,) = self.values(kind, 1, what)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{what} is {value}, not a finite number")
            return value
        (kind,) = self.unpack("I", what)
        if kind == ARRAY:
            raise ValueError(f"{what} is a list of lists, which no model has")
        count = self.count(f"the length of {what}", 8 if kind == STRING else 1, self._items)
        self._items -= count
        return self.values(kind, count, what)


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for i in range(count):
        (key,) = cursor.strings(1, f"key {i}")
        check_name(key, "key")
        if key in made:
            raise ValueError(f"the key {quote(key)} is given twice")
        made[key] = cursor.value(quote(key))
    return made


_Info = tuple[str, tuple[int, ...], int]  # kind, shape, offset


def _infos(cursor: _Cursor, count: int) -> dict[str, _Info]:
    made: dict[str, _Info] = {}
    for i in range(count):
        (name,) = cursor.strings(1, f"the name of tensor {i}")
        check_name(name, "tensor")
        what = f"tensor {quote(name)}"
        if name in made:
            raise ValueError(f"the {what} is given twice")
        (axes,) = cursor.unpack("I", what)
        shape = cursor.unpack(f"{axes}Q", what)[::-1]
        code, offset = cursor.unpack("IQ", what)
        if code not in NAMES:
            raise ValueError(f"{what} is of type {OTHERS.get(code, code)}, and qkv reads only {', '.join(KINDS)}")
        KINDS[NAMES[code]].check(shape, what)
        made[name] = NAMES[code], shape, offset
    return made


def _check_places(infos: dict[str, _Info], alignment: int, size: int) -> None:
    """Each tensor lies inside the data, aligned, and none on another."""
    places: list[tuple[int, int, str]] = []
    for name, (kind, shape, offset) in infos.items():
        end = offset + KINDS[kind].nbytes(shape)
        if offset % alignment:
            raise ValueError(f"tensor {quote(name)} is at {offset}, not a multiple of the alignment {alignment}")
        if end > size:
            raise ValueError(f"tensor {quote(name)} ends at byte {end} of the data, which has {max(size, 0)}")
        places.append((offset, end, name))
    for (_, end, first), (offset, _, second) in pairwise(sorted(places)):
        if offset < end:
            raise ValueError(f"tensor {quote(second)} overlaps {quote(first)}")


def _tensor(mapped: mmap.mmap, begin: int, name: str, shape: tuple[int, ...], offset: int) -> GGUFTensor:
    kind = KINDS[name]
    stored, dtype = kind.stored(shape), kind.dtype or torch.uint8
    flat = torch.frombuffer(mapped, dtype=dtype, count=math.prod(stored), offset=begin + offset)
    return GGUFTensor(name, shape, flat.view(stored))
