"""Files that may be damaged or hostile: read within limits, mapped into memory, written whole or not at all."""

import json
import mmap
import re
import reprlib
import stat
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qkv.errors import FileError
from qkv.shapes import Tensor

MAX_JSON = 16 << 20  # bytes; the index of a model with 100,000 tensors has 10 MB
MAX_PARTS = 400_000  # values in one JSON text, more or less: they cost time; a tensor in a header takes about 13
MAX_NAME = 500  # characters
MAX_COUNT = 1 << 60  # items or bytes; beyond it torch's own arithmetic would wrap
AGAIN = "copy or download the file again"

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", re.ASCII)
_SHORT = reprlib.Repr()
_SHORT.maxstring = 100


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the `ValueError`s and `OSError`s of a reader into `FileError`s that name the file."""
    try:
        yield
    except ValueError as error:
        raise FileError(f"{path}: {error}; {AGAIN}") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); check the disk and its permissions") from None


def file_size(path: Path) -> int:
    """Bytes in a regular file; to open anything else, such as a pipe, could block for ever.

    Raises:
        FileError: There is no such file, or it is not a regular one.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}; check the path") from None
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{path}: not a regular file; check the path")
    return found.st_size


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most `MAX_JSON` bytes.

    Raises:
        FileError: The file is missing, too large, not JSON, holds something else, or gives a key twice.
    """
    size = file_size(path)
    if size > MAX_JSON:
        raise FileError(f"{path}: has {size} bytes, more than the {MAX_JSON} of any such file; {AGAIN}")
    with reading(path):
        data = parse_json(path.read_bytes())
        if not isinstance(data, dict):
            raise ValueError(f"holds a {type(data).__name__} and must hold an object")
        return data


def parse_json(text: bytes) -> Any:
    """Plain data from JSON text that may be hostile.

    Raises:
        ValueError: Over `MAX_JSON` bytes or `MAX_PARTS` values, not JSON, or a key given twice.
    """
    if len(text) > MAX_JSON:
        raise ValueError(f"{len(text)} bytes of JSON, at most {MAX_JSON} are read")
    if (parts := sum(text.count(mark) for mark in b"{[:,")) > MAX_PARTS:
        raise ValueError(f"some {parts} values in its JSON, at most {MAX_PARTS} are read")
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({brief(error)})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(made := dict(pairs)) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {quote(twice)} is given twice")
    return made


# --- memory-mapped --------------------------------------------------------------------------------------------------


def map_file(path: Path) -> mmap.mmap:
    """A regular file in memory, read as it is used. Writing changes this process's copy; `give_back` knows it.

    Raises:
        FileError: As `file_size`.
        ValueError: It is empty.
    """
    if not file_size(path):
        raise ValueError("the file is empty")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if sys.platform == "linux":  # elsewhere the advice of `_Map.drop` means something else, or there is none
        _MAPS.append(_Map(mapped))
    return mapped


def give_back(tensors: Iterable[Tensor]) -> None:
    """Tell the system that tensors are needed no more: what was read of a mapped file leaves the memory at once.

    Whoever calls this promises to use none of them again, nor views of them: what was written to them is lost. Nothing
    happens to tensors outside of mapped files, nor where the system cannot be told.
    """
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            for known in list(_MAPS):
                known.drop(tensor.data_ptr(), tensor.nbytes)


class _Map:
    """A mapped file, while it is mapped: no other memory can lie in its range meanwhile."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self.begin = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
        self.size = len(mapped)
        self.mapped = weakref.ref(mapped, lambda _: _MAPS.remove(self))

    def drop(self, address: int, size: int) -> None:
        """The whole pages of a range, if it lies in this map; those at its ends hold parts of others."""
        mapped, begin = self.mapped(), address - self.begin
        if mapped is None or begin < 0 or begin + size > self.size:
            return
        first, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, (begin + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            mapped.madvise(mmap.MADV_DONTNEED, first, end - first)


_MAPS: list[_Map] = []


# --- names and messages ---------------------------------------------------------------------------------------------


def is_plain_name(name: object) -> bool:
    """Whether a name from a file may be used inside a folder: letters, digits, `_`, `-`, `.`; never a path."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def check_name(name: str, what: str) -> None:
    """Refuse the name of a tensor or key that could not be printed, or looks like a path.

    Raises:
        ValueError: It is one; the message begins with `what` and the name.
    """
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"{what} {quote(name)}: a name has 1 to {MAX_NAME} printable characters")
    if ".." in name or name.startswith("/"):
        raise ValueError(f"{what} {quote(name)}: a name must not look like a path")


def quote(value: object) -> str:
    """A value from a hostile file as part of a message: short, and its unprintable characters escaped."""
    return _SHORT.repr(value)


def brief(error: BaseException) -> str:
    """What an error says, short and in one line."""
    return " ".join(str(error).split())[:150] or type(error).__name__
