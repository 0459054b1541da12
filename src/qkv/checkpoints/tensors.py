"""Tensors on disk: safetensors files and folders of them, read with distrust.

The header is checked here: the safetensors library lets through duplicate keys and names such as `../x`. The data are
memory-mapped: read when they are used, and given back to the system when used no more, which the library's maps
cannot do. See https://github.com/huggingface/safetensors, "Format"; the tests hold both ways to the library.
"""

import hashlib
import json
import math
import mmap
import os
import re
import reprlib
import stat
import struct
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeGuard

import torch

from qkv.checkpoints.pickled import read_pickled
from qkv.errors import FileError
from qkv.shapes import Tensor

MAX_JSON = 16 << 20  # bytes; the index of a model with 100,000 tensors has 10 MB
MAX_PARTS = 400_000  # values in one JSON text, more or less: they cost time; a tensor in a header takes about 13
MAX_NAME = 500  # characters
MAX_COUNT = 1 << 60  # items or bytes; beyond it torch's own arithmetic would wrap

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", re.ASCII)
_SHORT = reprlib.Repr()
_SHORT.maxstring = 100
_AGAIN = "copy or download the file again"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, memory-mapped: the data is read when it is used.

    Writing into such a tensor changes this process's copy, never the file.

    Raises:
        FileError: The file is missing, or breaks a rule of the format; the message names the tensor.
    """
    start, entries = _check_file(path)
    if not any(entry.end > entry.begin for entry in entries.values()):
        return {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be mapped ({_line(error)}); check the disk and its permissions") from None
    tensors = {name: _view(mapped, start + entry.begin, entry) for name, entry in entries.items()}
    remember_map(mapped)
    return tensors


def remember_map(mapped: mmap.mmap) -> None:
    """Let `give_back` know a mapped file."""
    _Map.remember(mapped)


def give_back(tensors: Iterable[Tensor]) -> None:
    """Tell the system that tensors are needed no more: what was read of a mapped file leaves the memory at once.

    Whoever calls this promises to use none of them again, nor views of them: what was written to them is lost. Nothing
    happens to tensors outside of the files that `remember_map` was told of, nor where the system cannot be told.
    """
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            for known in list(_Map.known):
                known.drop(tensor.data_ptr(), tensor.nbytes)


class _Map:
    """A mapped file, while it is mapped: no other memory can lie in its range meanwhile."""

    known: ClassVar[list["_Map"]] = []

    def __init__(self, mapped: mmap.mmap) -> None:
        self.begin = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
        self.size = len(mapped)
        self.mapped = weakref.ref(mapped, lambda _: _Map.known.remove(self))

    @classmethod
    def remember(cls, mapped: mmap.mmap) -> None:
        if sys.platform == "linux":  # elsewhere the advice means something else, or there is none
            cls.known.append(cls(mapped))

    def drop(self, address: int, size: int) -> None:
        """The whole pages of a range, if it lies in this map; those at its ends hold parts of others."""
        mapped, begin = self.mapped(), address - self.begin
        if mapped is None or begin < 0 or begin + size > self.size:
            return
        first, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, (begin + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            mapped.madvise(mmap.MADV_DONTNEED, first, end - first)


def _view(mapped: mmap.mmap, begin: int, entry: "_Entry") -> Tensor:
    count = math.prod(entry.shape)
    if count == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    if begin % entry.dtype.itemsize:  # not aligned: the format does not promise it
        whole = bytearray(mapped[begin : begin + count * entry.dtype.itemsize])
        return torch.frombuffer(whole, dtype=entry.dtype).view(entry.shape)
    return torch.frombuffer(mapped, dtype=entry.dtype, count=count, offset=begin).view(entry.shape)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, whole or not at all; it is on the disk (fsync) on return.

    Args:
        path: A file of this name is replaced.
        tensors: Any device, strides and sharing. A tensor under two names is written twice.
        metadata: Free text; Hugging Face's loaders expect `{"format": "pt"}`.

    Raises:
        FileError: The disk is full or not writable, or a tensor has a name or dtype that the format does not hold.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.writelines(encode_tensors(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise FileError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another place"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[Any]:
    """The bytes of a safetensors file in pieces: the header, then each tensor's buffer.

    A contiguous tensor on the CPU is not copied; any other one is, while its piece is in use.

    Raises:
        FileError: A tensor has a name or dtype that the format does not hold.
    """
    # Wide dtypes first: so every tensor is aligned to its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise FileError(f"{_quote(name)}: safetensors files hold no {tensor.dtype}; convert it first")
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        _check_header(text, end)
    except ValueError as error:
        raise FileError(f"the tensors to write: {error}; rename them or use several files") from None
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the safetensors file that the tensors would make: names, types, shapes and every bit of the data.

    Raises:
        FileError: As `encode_tensors`.
    """
    made = hashlib.sha256()
    for piece in encode_tensors(tensors):
        made.update(piece)
    return made.hexdigest()


def read_folder(folder: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of a model folder in the Hugging Face layout: one safetensors file, or shards and their index.

    Args:
        folder: Holds `model.safetensors` or `model.safetensors.index.json`.
        allow_pickle: Where there is neither, read `pytorch_model.bin` (or its shards) with `weights_only`.

    Raises:
        FileError: There is no such file, or the shards are not exactly what the index lists.
    """
    kinds: list[tuple[str, Callable[[Path], dict[str, Tensor]]]] = [("model.safetensors", read_tensors)]
    if allow_pickle:
        kinds.append(("pytorch_model.bin", read_pickled))
    for name, read in kinds:
        if (folder / name).exists():
            return read(folder / name)
        if (folder / f"{name}.index.json").exists():
            return _read_shards(folder / f"{name}.index.json", Path(name).suffix, read)
    if any(folder.glob("pytorch_model.bin*")):
        raise FileError(
            f"{folder}: has its weights only as pytorch_model.bin, a pickle, and a pickle can run code; "
            "use model.safetensors, or allow_pickle=True if you trust the author"
        )
    raise FileError(f"{folder}: has no model.safetensors and no model.safetensors.index.json; give a model's folder")


def read_json(path: Path) -> Any:
    """Plain data from a JSON file of at most `MAX_JSON` bytes.

    Raises:
        FileError: The file is missing, too large, not JSON, or gives a key twice.
    """
    size = file_size(path)
    if size > MAX_JSON:
        raise FileError(f"{path}: has {size} bytes, more than the {MAX_JSON} of any such file; {_AGAIN}")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise FileError(f"{path}: {error}; {_AGAIN}") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); check the disk and its permissions") from None


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
        raise ValueError(f"not valid JSON ({_line(error)})") from None


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def is_plain_name(name: object) -> bool:
    """Whether a name from a file may be used inside a folder: letters, digits, `_`, `-`, `.`; never a path."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def _read_shards(index: Path, suffix: str, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    content = read_json(index)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise FileError(f"{index}: weight_map is missing or empty; {_AGAIN}")
    for shard in shard_of.values():
        if not is_plain_name(shard) or not shard.endswith(suffix):
            raise FileError(f"{index}: weight_map names {_quote(shard)}, not a {suffix} file of this folder; {_AGAIN}")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        found = read(index.parent / shard)
        for name in found:
            if shard_of.get(name) != shard:
                raise FileError(f"{index.parent / shard}: holds {_quote(name)}, unlike {index.name} says; {_AGAIN}")
        tensors |= found
    for name, shard in shard_of.items():
        if name not in tensors:
            raise FileError(f"{index.parent / shard}: lacks {_quote(name)}, which {index.name} lists; {_AGAIN}")
    return tensors


# --- the header -----------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """Where a tensor lies, in bytes of the data, and what it is."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: list[int]


def _check_file(path: Path) -> tuple[int, dict[str, _Entry]]:
    """Where the data begin, and what they are."""
    size = file_size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_JSON):
                raise ValueError(f"header length {length} does not fit a file of {size} bytes (at most {MAX_JSON})")
            return 8 + length, _check_header(file.read(length), size - 8 - length)
    except ValueError as error:
        raise FileError(f"{path}: {error}; {_AGAIN}") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); check the disk and its permissions") from None


def _check_header(text: bytes, data_size: int) -> dict[str, _Entry]:
    header = parse_json(text)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ must hold text only")
    entries = {name: _entry(name, entry) for name, entry in header.items()}
    ranges = sorted((entry.begin, entry.end, name) for name, entry in entries.items())
    position = 0
    for begin, end, name in ranges:
        if begin != position:
            kind = "overlap the tensor before" if begin < position else "leave a hole before"
            raise ValueError(f"tensor {_quote(name)}: data_offsets {begin} to {end} {kind}")
        position = end
    if position != data_size:
        raise ValueError(f"data_offsets end at {position}, the data has {data_size} bytes")
    return entries


def _entry(name: str, entry: object) -> _Entry:
    """A tensor's entry, after all checks that need no other tensor."""
    where = f"tensor {_quote(name)}"
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"{where}: a name has 1 to {MAX_NAME} printable characters")
    if ".." in name or name.startswith("/"):
        raise ValueError(f"{where}: a name must not look like a path")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: needs exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{where}: dtype {_quote(code)} is not one of {', '.join(DTYPES)}")
    # An empty tensor's other axes take no bytes, but torch multiplies them for its strides.
    if not _are_counts(shape, 64) or math.prod(max(size, 1) for size in shape) > MAX_COUNT:
        raise ValueError(f"{where}: shape {_quote(shape)} is not a list of possible sizes")
    if not _are_counts(offsets, 2) or len(offsets) != 2:
        raise ValueError(f"{where}: data_offsets {_quote(offsets)} is not a pair of byte positions")
    begin, end = offsets
    if end - begin != (needed := math.prod(shape) * DTYPES[code].itemsize):
        raise ValueError(f"{where}: shape {shape} of {code} needs {needed} bytes, data_offsets give {end - begin}")
    return _Entry(begin, end, DTYPES[code], shape)


def _are_counts(values: object, at_most: int) -> TypeGuard[list[int]]:
    if not isinstance(values, list) or len(values) > at_most:
        return False
    return all(type(value) is int and 0 <= value <= MAX_COUNT for value in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {_quote(twice)} is given twice")
    return made


def _quote(value: object) -> str:
    """A value from a hostile file as part of a message: short, and its unprintable characters escaped."""
    return _SHORT.repr(value)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
