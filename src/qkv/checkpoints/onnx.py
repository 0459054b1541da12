"""The weights in an ONNX file, read with distrust: every length is checked against the bytes that are there.

The format: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, in the encoding of protocol buffers. Of a graph its
tensors are taken, and what its nodes are called and read; nothing is run.
"""

import math
import mmap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import numpy as np
import torch

from qkv.checkpoints.files import check_name, map_file, quote, reading
from qkv.shapes import Tensor

MAX_FIELDS: Final = 1 << 20  # that are looked at: they cost time; a ViT of 12 layers has 14,000
MAX_AXES: Final = 8
MAX_TEXT: Final = 1000  # bytes of a name

_TYPES: Final = {1: np.dtype("<f4"), 7: np.dtype("<i8"), 10: np.dtype("<f2"), 11: np.dtype("<f8")}
"""Kinds of numbers, by ONNX's codes."""
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # how a field is written


@final
class Node(NamedTuple):
    """An operation.

    Attributes:
        kind: Such as `MatMul`.
        name: PyTorch's exporter makes it of the path of the module.
        inputs: The names of what it reads.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]


@final
@dataclass(frozen=True)
class Graph:
    """What an ONNX file holds of a network.

    Attributes:
        tensors: By name, in the order of the file.
        nodes: In the order in which they are computed.
    """

    tensors: dict[str, Tensor]
    nodes: list[Node]


def read_onnx(path: Path) -> Graph:
    """The graph of an ONNX file whose numbers lie in it, as `raw_data`.

    Raises:
        FileError: The file is missing, breaks a rule of the format, or holds what qkv does not read.
    """
    with reading(path):
        mapped = map_file(path)
        reader = _Reader(mapped)
        graphs = reader.message((0, len(mapped)), "the file")[7]
        if len(graphs) != 1:
            raise ValueError(f"holds {len(graphs)} graphs, so it is no ONNX file, or is damaged")
        graph = reader.message(graphs[0], "the graph")
        tensors: dict[str, Tensor] = {}
        for span in graph[5]:
            name, tensor = reader.tensor(span)
            if name in tensors:
                raise ValueError(f"the tensor {quote(name)} is given twice")
            tensors[name] = tensor
        return Graph(tensors, [reader.node(span) for span in graph[1]])


@final
class _Reader:
    """Takes messages apart. A value is a number, or for whatever is written as bytes where these begin and end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._left = MAX_FIELDS

    def message(self, span: Any, what: str) -> defaultdict[int, list[Any]]:
        """The values of each field, by its number."""
        at, end = self._bytes(span, what)
        made: defaultdict[int, list[Any]] = defaultdict(list)
        while at < end:
            key, at = self._varint(at, end)
            field, way = key >> 3, key & 7
            if way == _VARINT:
                value, at = self._varint(at, end)
                made[field].append(value)
                continue
            if way not in (_EIGHT, _BYTES, _FOUR):
                raise ValueError(f"{what} has a field at byte {at} that is written in the unknown way {way}")
            size, at = self._varint(at, end) if way == _BYTES else (8 if way == _EIGHT else 4, at)
            if size > end - at:
                raise ValueError(f"{what} ends at byte {end}, and a field at byte {at} has {size} bytes")
            made[field].append((at, at + size))
            at += size
        return made

    def node(self, span: Any) -> Node:
        message = self.message(span, "a node")
        kind, name = (self._text(message[field], "the name of a node") for field in (4, 3))
        return Node(kind, name, tuple(self._text([each], "an input") for each in message[1]))

    def tensor(self, span: Any) -> tuple[str, Tensor]:
        """Its name and a copy of it: its numbers may lie anywhere in the file, aligned or not."""
        message = self.message(span, "a tensor")
        name = self._text(message[8], "the name of a tensor")
        check_name(name, "tensor")
        what, kind = f"the tensor {quote(name)}", message[2][-1] if message[2] else 0
        if kind not in _TYPES:
            raise ValueError(f"{what} is of type {quote(kind)}, and qkv reads {', '.join(map(str, _TYPES))}")
        shape = [n for value in message[1] for n in self._numbers(value)]
        if len(message[9]) != 1 or message[13] or any(message[14]):
            raise ValueError(f"{what} does not keep its numbers as raw_data in the file")
        begin, end = self._bytes(message[9][0], what)
        if len(shape) > MAX_AXES or math.prod(shape) * _TYPES[kind].itemsize != end - begin:
            raise ValueError(f"{what} has {end - begin} bytes, which is not what its shape {quote(shape)} needs")
        flat = np.frombuffer(self._data, _TYPES[kind], math.prod(shape), begin)
        return name, torch.from_numpy(flat.copy()).view(shape)

    def _numbers(self, value: Any) -> Iterator[int]:
        """A number, or several side by side."""
        if isinstance(value, int):
            yield value
            return
        at, end = value
        while at < end:
            number, at = self._varint(at, end)
            yield number

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """A number, seven bits in each byte, and where it ends."""
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"has more than {MAX_FIELDS} numbers and fields")
        value = 0
        for i in range(10):
            if at + i >= end:
                raise ValueError(f"ends at byte {end} within a number")
            byte = self._data[at + i]
            value |= (byte & 127) << 7 * i
            if byte < 128:
                return value, at + i + 1
        raise ValueError(f"has a number of more than 10 bytes at byte {at}")

    def _text(self, values: list[Any], what: str) -> str:
        """The last of the values, as of a field that should be given once; nothing where there is none."""
        begin, end = self._bytes(values[-1], what) if values else (0, 0)
        if end - begin > MAX_TEXT:
            raise ValueError(f"{what} has {end - begin} bytes, more than {MAX_TEXT}")
        return str(self._data[begin:end], "utf-8")

    def _bytes(self, value: Any, what: str) -> tuple[int, int]:
        if isinstance(value, int):
            raise ValueError(f"{what} is a number and must be bytes")
        return value
