"""GGUF files, written whole or not at all."""

import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from qkv.checkpoints.gguf.blocks import quantise
from qkv.checkpoints.gguf.kinds import KINDS
from qkv.checkpoints.gguf.reader import ALIGNMENT, ARRAY, MAX_AXES, STRING, GGUFTensor, check_name
from qkv.checkpoints.tensors import sync_folder
from qkv.errors import ConfigError, FileError
from qkv.shapes import Tensor

_FILE_TYPES: Final = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""`general.file_type`: what most weights are."""
_U32, _I32, _F32, _BOOL, _U64, _I64 = 4, 5, 6, 7, 10, 11
_FORMATS: Final = {_U32: "I", _I32: "i", _F32: "f", _BOOL: "?", _U64: "Q", _I64: "q"}


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> None:
    """Write a GGUF file of version 3, whole or not at all; it is on the disk (fsync) on return.

    Args:
        path: A file of this name is replaced.
        metadata: Bools, strings, numbers, and lists of one of those. A whole number becomes 32 bits wide where it fits
            (unsigned where it is not negative, but signed in lists), another number a float32.
        tensors: As `read_gguf` gives them, or from `encode`. Blocks go out byte for byte.

    Raises:
        FileError: The disk is full or not writable, or a name, value or tensor is none that the format holds.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.writelines(_pieces(metadata, tensors))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except ValueError as error:
        raise FileError(f"{path}: {error}; change what is to be written") from None
    except OSError as error:
        reason = error.strerror
        raise FileError(f"{path}: cannot be written ({reason}); free some space or choose another place") from None
    finally:
        partial.unlink(missing_ok=True)


def encode(tensors: Mapping[str, GGUFTensor], kind: str) -> dict[str, GGUFTensor]:
    """The tensors with every matrix as `kind`.

    Vectors and the table of positions become F32, as llama.cpp needs them. What is of its kind already stays as it is.

    Raises:
        ConfigError: An unknown kind, blocks of another kind, or a matrix whose rows are not whole blocks.
    """
    if kind not in _FILE_TYPES:
        raise ConfigError(f"qkv writes no GGUF tensors of kind {kind!a}; choose one of {', '.join(_FILE_TYPES)}")
    exact = {name for name, tensor in tensors.items() if len(tensor.shape) < 2 or name == "position_embd.weight"}
    return {name: _encode(name, tensor, "F32" if name in exact else kind) for name, tensor in tensors.items()}


def file_type(kind: str) -> dict[str, int]:
    """The metadata that says what most weights are."""
    return {"general.file_type": _FILE_TYPES[kind]}


def _encode(name: str, tensor: GGUFTensor, kind: str) -> GGUFTensor:
    if tensor.kind == kind:
        return tensor
    if KINDS[tensor.kind].dtype is None:
        raise ConfigError(f"{name}: is {tensor.kind} and cannot become {kind}; expand it first")
    try:
        data = tensor.data.to(dtype) if (dtype := KINDS[kind].dtype) else quantise(tensor.data, kind)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return GGUFTensor(kind, tensor.shape, data)


def _pieces(metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> Iterator[Any]:
    """The bytes of the file: the header, then each tensor's buffer and its padding."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!a} and must be a power of two, at least 8")
    header = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        check_name(key, "key")
        header += _string(key) + _value(key, value)
    offset = 0
    for name, tensor in tensors.items():
        size = _check(name, tensor)
        header += _string(name) + struct.pack("<I", len(tensor.shape))
        header += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        header += struct.pack("<IQ", KINDS[tensor.kind].code, offset)
        offset += size + -size % alignment
    yield bytes(header) + bytes(-len(header) % alignment)
    for tensor in tensors.values():
        yield _buffer(tensor.data)
        yield bytes(-KINDS[tensor.kind].nbytes(tensor.shape) % alignment)


def _check(name: str, tensor: GGUFTensor) -> int:
    """Bytes of a tensor that the format can hold."""
    check_name(name, "tensor")
    kind = KINDS[tensor.kind]
    if not 1 <= len(tensor.shape) <= MAX_AXES or min(tensor.shape) < 1 or tensor.shape[-1] % kind.block:
        raise ValueError(f"tensor {name!a} has the shape {tensor.shape}, which no {tensor.kind} tensor has")
    if tuple(tensor.data.shape) != kind.stored(tensor.shape) or tensor.data.dtype != (kind.dtype or torch.uint8):
        found = f"{tuple(tensor.data.shape)} of {tensor.data.dtype}"
        raise ValueError(f"tensor {name!a}: {found} is not how {tensor.shape} of {tensor.kind} is stored")
    return math.prod(kind.stored(tensor.shape)) * tensor.data.itemsize


def _buffer(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, list | tuple):
        return struct.pack("<I", ARRAY) + _array(key, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    kind = _number_kind(key, [value], signed=False)
    return struct.pack(f"<I{_FORMATS[kind]}", kind, value)


def _array(key: str, values: Sequence[Any]) -> bytes:
    if values and all(isinstance(value, str) for value in values):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(map(_string, values))
    kind = _number_kind(key, values, signed=True)
    return struct.pack(f"<IQ{len(values)}{_FORMATS[kind]}", kind, len(values), *values)


def _number_kind(key: str, values: Sequence[Any], *, signed: bool) -> int:
    types = {type(value) for value in values}
    if types == {bool}:
        return _BOOL
    if types <= {int, float} and float in types:
        return _F32
    if types <= {int}:
        low, high = min(values, default=0), max(values, default=0)
        for kind, least, most in _WIDTHS if signed or low < 0 else _WIDTHS[2:]:
            if least <= low and high <= most:
                return kind
    raise ValueError(f"{key!a} holds what GGUF cannot: {values[0]!a}" if values else f"{key!a} is empty")


_WIDTHS = ((_I32, -(2**31), 2**31 - 1), (_I64, -(2**63), 2**63 - 1), (_U32, 0, 2**32 - 1), (_U64, 0, 2**64 - 1))
