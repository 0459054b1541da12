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

from qkv.checkpoints.gguf.kinds import KINDS, NAMES, OTHERS
from qkv.checkpoints.tensors import MAX_COUNT, MAX_NAME, file_size, remember_map
from qkv.errors import FileError
from qkv.shapes import Tensor

MAX_HEADER: Final = 64 << 20  # bytes; the largest vocabularies take 16 MB
MAX_ITEMS: Final = 1 << 21  # in all arrays of a file together: they cost time; 262,144 tokens with merges are 1.3 M
MAX_KEYS: Final = 10_000
MAX_TENSORS: Final = 20_000
MAX_AXES: Final = 4
ALIGNMENT: Final = 32  # bytes, where the file says nothing
_AGAIN = "copy or download the file again"

STRING: Final = 8
ARRAY: Final = 9
NUMBERS: Final[dict[int, str]] = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""The types of metadata by their number in the format, as NumPy calls them."""

_U64 = struct.Struct("<Q").unpack_from


@final
@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file.

    Attributes:
        kind: A name from `KINDS`.
        shape: Of the numbers, in the order of torch: rows, columns.
        data: Memory-mapped. Plain numbers in their dtype and `shape`; blocks as uint8, (rows, bytes of a row), so that
            rows can be moved about before they are expanded. Writing into it never changes the file.
    """

    kind: str
    shape: tuple[int, ...]
    data: Tensor


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
    size = file_size(path)
    try:
        if size < 24:
            raise ValueError(f"has {size} bytes, a GGUF file at least 24")
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        made = _read(path, mapped, size)
        remember_map(mapped)
        return made
    except ValueError as error:
        raise FileError(f"{path}: {error}; {_AGAIN}") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); check the disk and its permissions") from None


def check_name(name: str, what: str) -> None:
    """Refuse a name that could not be printed, or looks like a path.

    Raises:
        ValueError: It is one.
    """
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"{what} {name[:100]!a}: a name has 1 to {MAX_NAME} printable characters")
    if ".." in name or name.startswith("/"):
        raise ValueError(f"{what} {name[:100]!a}: a name must not look like a path")


@final
class _Cursor:
    """Reads one value after the other, and none beyond the end."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data = memoryview(data)
        self.at = 0
        self._size = size
        self._end = min(size, MAX_HEADER)
        self._items = MAX_ITEMS

    def skip(self, count: int, what: str) -> int:
        """Where the next `count` bytes begin."""
        if count > self._end - self.at:
            limit = f"the file has {self._size}" if self._end == self._size else f"a header has at most {MAX_HEADER}"
            raise ValueError(f"{what} needs {count} bytes at {self.at}, {limit}")
        self.at += count
        return self.at - count

    def count(self, what: str, at_least: int, at_most: int) -> int:
        """A number of things that take `at_least` bytes each."""
        count = _U64(self.data, self.skip(8, what))[0]
        if count > at_most or count * at_least > self._end - self.at:
            raise ValueError(f"{what} is {count}, more than {min(at_most, (self._end - self.at) // at_least)}")
        return count

    def u32(self, what: str) -> int:
        return struct.unpack_from("<I", self.data, self.skip(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64(self.data, self.skip(8, what))[0]

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

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

    def numbers(self, kind: int, count: int, what: str) -> list[Any]:
        if kind not in NUMBERS:
            raise ValueError(f"{what} has the unknown type {kind}")
        dtype = np.dtype(NUMBERS[kind])
        start = self.skip(count * dtype.itemsize, what)
        found = np.frombuffer(self.data, np.uint8 if dtype.kind == "b" else dtype, count, start)
        if dtype.kind == "b" and (found > 1).any():
            raise ValueError(f"{what} is {found.max()} and must be 0 or 1")
        return found.astype(dtype, copy=False).tolist()

    def array(self, what: str) -> list[Any]:
        kind = self.u32(what)
        if kind == ARRAY:
            raise ValueError(f"{what} is a list of lists, which no model has")
        width = 8 if kind == STRING else 1
        count = self.count(f"the length of {what}", width, self._items)
        self._items -= count
        return self.strings(count, what) if kind == STRING else self.numbers(kind, count, what)

    def value(self, what: str) -> Any:
        kind = self.u32(what)
        if kind == ARRAY:
            return self.array(what)
        value = self.string(what) if kind == STRING else self.numbers(kind, 1, what)[0]
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{what} is {value}, not a finite number")
        return value


def _read(path: Path, mapped: mmap.mmap, size: int) -> GGUF:
    cursor = _Cursor(mapped, size)
    if cursor.data[:4] != b"GGUF":
        raise ValueError("does not begin with 'GGUF', so it is no GGUF file")
    cursor.skip(4, "the magic")
    version = cursor.u32("the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        raise ValueError(
            "is big-endian, and qkv reads little-endian files"
            if swapped in (1, 2, 3)
            else f"has version {version}, and qkv reads 2 and 3"
        )
    n_tensors = cursor.count("the number of tensors", 24, MAX_TENSORS)
    metadata = _metadata(cursor, cursor.count("the number of keys", 13, MAX_KEYS))
    infos = _infos(cursor, n_tensors)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!a} and must be a power of two from 8 to {1 << 20}")
    begin = cursor.at + -cursor.at % alignment
    _check_places(infos, alignment, size - begin)
    return GGUF(path, metadata, {name: _tensor(mapped, begin, *info) for name, info in infos.items()})


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for i in range(count):
        key = cursor.string(f"key {i}")
        check_name(key, "key")
        if key in made:
            raise ValueError(f"the key {key!a} is given twice")
        made[key] = cursor.value(f"{key!a}")
    return made


_Info = tuple[str, tuple[int, ...], int]  # kind, shape, offset


def _infos(cursor: _Cursor, count: int) -> dict[str, _Info]:
    made: dict[str, _Info] = {}
    for i in range(count):
        name = cursor.string(f"the name of tensor {i}")
        check_name(name, "tensor")
        if name in made:
            raise ValueError(f"the tensor {name!a} is given twice")
        what = f"tensor {name!a}"
        axes = cursor.u32(what)
        if not 1 <= axes <= MAX_AXES:
            raise ValueError(f"{what} has {axes} axes, a tensor 1 to {MAX_AXES}")
        shape = tuple(cursor.u64(what) for _ in range(axes))[::-1]
        made[name] = (_kind(cursor.u32(what), shape, what), shape, cursor.u64(what))
    return made


def _kind(code: int, shape: tuple[int, ...], what: str) -> str:
    if code not in NAMES:
        raise ValueError(f"{what} is of type {OTHERS.get(code, code)}, and qkv reads only {', '.join(KINDS)}")
    kind = NAMES[code]
    if min(shape) < 1 or math.prod(shape) > MAX_COUNT:
        raise ValueError(f"{what} has the impossible shape {shape}")
    if shape[-1] % KINDS[kind].block:
        raise ValueError(f"{what} has rows of {shape[-1]}, not a multiple of the {KINDS[kind].block} of {kind}")
    return kind


def _check_places(infos: dict[str, _Info], alignment: int, size: int) -> None:
    """Each tensor lies inside the data, aligned, and none on another."""
    places: list[tuple[int, int, str]] = []
    for name, (kind, shape, offset) in infos.items():
        end = offset + KINDS[kind].nbytes(shape)
        if offset % alignment:
            raise ValueError(f"tensor {name!a} is at {offset}, not a multiple of the alignment {alignment}")
        if end > size:
            raise ValueError(f"tensor {name!a} ends at byte {end} of the data, which has {max(size, 0)}")
        places.append((offset, end, name))
    for (_, end, first), (offset, _, second) in pairwise(sorted(places)):
        if offset < end:
            raise ValueError(f"tensor {second!a} overlaps {first!a}")


def _tensor(mapped: mmap.mmap, begin: int, name: str, shape: tuple[int, ...], offset: int) -> GGUFTensor:
    kind = KINDS[name]
    stored = kind.stored(shape)
    dtype = kind.dtype or torch.uint8
    flat = torch.frombuffer(mapped, dtype=dtype, count=math.prod(stored), offset=begin + offset)
    return GGUFTensor(name, shape, flat.view(stored))
