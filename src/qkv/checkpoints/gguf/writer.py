"""GGUF files, written whole or not at all."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from qkv.checkpoints.files import check_name
from qkv.checkpoints.gguf.blocks import quantise
from qkv.checkpoints.gguf.kinds import ARRAY, KINDS, NUMBERS, STRING, GGUFTensor, alignment_of
from qkv.checkpoints.tensors import raw_bytes
from qkv.disk import write_whole, writing
from qkv.errors import ConfigError, FileError

_FILE_TYPES: Final = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""`general.file_type`: what most weights are."""


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
    try:
        alignment, header = alignment_of(metadata), _header(metadata, tensors)
    except ValueError as error:
        raise FileError(f"{path}: {error}; change what is to be written") from None
    with writing(path):
        write_whole(path, _pieces(header, tensors, alignment))


def _pieces(header: bytes, tensors: Mapping[str, GGUFTensor], alignment: int) -> Iterator[Any]:
    yield header
    yield bytes(-len(header) % alignment)
    for tensor in tensors.values():
        yield raw_bytes(tensor.data)
        yield bytes(-tensor.data.nbytes % alignment)


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
    if data.is_floating_point() and not data.isfinite().all():
        raise ConfigError(f"{name}: a weight is not finite in {kind}; choose BF16 or F32, or fix the model")
    return GGUFTensor(kind, tensor.shape, data)


def _header(metadata: Mapping[str, Any], tensors: Mapping[str, GGUFTensor]) -> bytes:
    alignment, offset = alignment_of(metadata), 0
    header = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        check_name(key, "key")
        header += _string(key) + _value(key, value)
    for name, tensor in tensors.items():
        check_name(name, "tensor")
        kind, stored = KINDS[tensor.kind], (tuple(tensor.data.shape), tensor.data.dtype)
        kind.check(tensor.shape, f"tensor {name!a}")
        if stored != (kind.stored(tensor.shape), kind.dtype or torch.uint8):
            raise ValueError(f"tensor {name!a}: {stored} is not how {tensor.shape} of {tensor.kind} is stored")
        axes = len(tensor.shape)
        header += _string(name) + struct.pack(f"<I{axes}QIQ", axes, *reversed(tensor.shape), kind.code, offset)
        offset += tensor.data.nbytes + -tensor.data.nbytes % alignment
    return bytes(header)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    if not isinstance(value, list | tuple):
        kind = _type_of(key, [value], _SINGLE)
        return struct.pack("<I", kind) + _bytes(kind, [value])
    kind = _type_of(key, value, _LISTED)
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + _bytes(kind, value)


def _bytes(kind: int, values: Sequence[Any]) -> bytes:
    return b"".join(map(_string, values)) if kind == STRING else np.array(values, NUMBERS[kind]).tobytes()


_SINGLE, _LISTED = (4, 10, 5, 11), (5, 11, 4, 10)  # types of whole numbers; the first one that holds them is taken


def _type_of(key: str, values: Sequence[Any], whole: Sequence[int]) -> int:
    """The type of the format for values."""
    types = {type(value) for value in values}
    if types == {str}:
        return STRING
    if types == {bool}:
        return 7
    if float in types and types <= {int, float} and max(map(abs, values)) <= np.finfo(NUMBERS[6]).max:
        return 6
    for kind in whole if types <= {int} else ():
        limits = np.iinfo(NUMBERS[kind])
        if limits.min <= min(values, default=0) and max(values, default=0) <= limits.max:
            return kind
    raise ValueError(f"{key!a} holds what GGUF cannot: {values[0]!a}")
