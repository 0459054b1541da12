"""Tensors on disk: safetensors files and folders of them, read with distrust.

The header is checked here: the safetensors library lets through duplicate keys and names such as `../x`. The data are
memory-mapped, and given back to the system when used no more, which the library's maps cannot do.
See https://github.com/huggingface/safetensors, "Format"; the tests hold both ways to the library.
"""

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch

from qkv.checkpoints.files import (
    AGAIN,
    MAX_COUNT,
    MAX_JSON,
    check_name,
    is_plain_name,
    map_file,
    parse_json,
    quote,
    read_json,
    reading,
)
from qkv.checkpoints.pickled import read_pickled
from qkv.disk import write_whole, writing
from qkv.errors import FileError
from qkv.shapes import Tensor

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
Change: TypeAlias = Callable[[str, Tensor], Tensor]
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, memory-mapped: the data is read when it is used.

    Writing into such a tensor changes this process's copy, never the file.

    Raises:
        FileError: The file is missing, or breaks a rule of the format; the message names the tensor.
    """
    with reading(path):
        mapped = map_file(path)
        size, length = len(mapped), int.from_bytes(mapped[:8], "little")
        if size < 8 or length > min(size - 8, MAX_JSON):
            raise ValueError(f"header length {length} does not fit a file of {size} bytes (at most {MAX_JSON})")
        entries = _check_header(mapped[8 : 8 + length], size - 8 - length)
    return {name: _view(mapped, 8 + length + entry.begin, entry) for name, entry in entries.items()}


def _view(mapped: mmap.mmap, begin: int, entry: "_Entry") -> Tensor:
    if entry.end == entry.begin:
        return torch.empty(entry.shape, dtype=entry.dtype)
    if begin % entry.dtype.itemsize:  # not aligned: the format does not promise it
        whole = bytearray(mapped[begin : begin + entry.end - entry.begin])
        return torch.frombuffer(whole, dtype=entry.dtype).view(entry.shape)
    count = math.prod(entry.shape)
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
    with writing(path):
        write_whole(path, encode_tensors(tensors, metadata))


def encode_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    change: Change = lambda name, tensor: tensor,
) -> Iterator[Any]:
    """The bytes of a safetensors file in pieces: the header, then each tensor's buffer.

    A contiguous tensor on the CPU is not copied; any other one is, while its piece is in use. `change` makes another of
    the same shape and type of each, when its turn comes.

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
            raise FileError(f"{quote(name)}: safetensors files hold no {tensor.dtype}; convert it first")
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
        yield raw_bytes(change(name, tensors[name]))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, not copied where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest(tensors: Mapping[str, Tensor], change: Change = lambda name, tensor: tensor) -> str:
    """SHA-256 of the safetensors file that `encode_tensors` makes: names, types, shapes and every bit of the data."""
    made = hashlib.sha256()
    for piece in encode_tensors(tensors, change=change):
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


def _read_shards(index: Path, suffix: str, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise FileError(f"{index}: weight_map is missing or empty; {AGAIN}")
    for shard in shard_of.values():
        if not is_plain_name(shard) or not shard.endswith(suffix):
            raise FileError(f"{index}: weight_map names {quote(shard)}, not a {suffix} file of this folder; {AGAIN}")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        found = read(index.parent / shard)
        for name in found:
            if shard_of.get(name) != shard:
                raise FileError(f"{index.parent / shard}: holds {quote(name)}, unlike {index.name} says; {AGAIN}")
        tensors |= found
    for name, shard in shard_of.items():
        if name not in tensors:
            raise FileError(f"{index.parent / shard}: lacks {quote(name)}, which {index.name} lists; {AGAIN}")
    return tensors


# --- the header -----------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """Where a tensor lies, in bytes of the data, and what it is."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: list[int]


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
            raise ValueError(f"tensor {quote(name)}: data_offsets {begin} to {end} {kind}")
        position = end
    if position != data_size:
        raise ValueError(f"data_offsets end at {position}, the data has {data_size} bytes")
    return entries


def _entry(name: str, entry: object) -> _Entry:
    """A tensor's entry, after all checks that need no other tensor."""
    check_name(name, "tensor")
    where = f"tensor {quote(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: needs exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{where}: dtype {quote(code)} is not one of {', '.join(DTYPES)}")
    # An empty tensor's other axes take no bytes, but torch multiplies them for its strides.
    if not _are_counts(shape, 64) or math.prod(max(size, 1) for size in shape) > MAX_COUNT:
        raise ValueError(f"{where}: shape {quote(shape)} is not a list of possible sizes")
    if not _are_counts(offsets, 2) or len(offsets) != 2:
        raise ValueError(f"{where}: data_offsets {quote(offsets)} is not a pair of byte positions")
    begin, end = offsets
    if end - begin != (needed := math.prod(shape) * DTYPES[code].itemsize):
        raise ValueError(f"{where}: shape {shape} of {code} needs {needed} bytes, data_offsets give {end - begin}")
    return _Entry(begin, end, DTYPES[code], shape)


def _are_counts(values: object, at_most: int) -> TypeGuard[list[int]]:
    if not isinstance(values, list) or len(values) > at_most:
        return False
    return all(type(value) is int and 0 <= value <= MAX_COUNT for value in values)
