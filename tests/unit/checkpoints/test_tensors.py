"""safetensors files: the library is the oracle both ways; every rule of the format is broken once."""

import errno
import json
import os
import struct
import time

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv.checkpoints import read_folder, read_tensors, write_tensors
from qkv.checkpoints.files import MAX_JSON, MAX_PARTS
from qkv.checkpoints.tensors import DTYPES, encode_tensors
from qkv.errors import FileError


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and as_bytes(a) == as_bytes(b)


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def every_dtype():
    """Random bits (NaNs and infinities among them) in each dtype, with a 0-d and an empty tensor of each."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES.values():
        high = 2 if dtype == torch.bool else 256
        bits = torch.randint(high, (3, 5 * dtype.itemsize), dtype=torch.uint8, generator=generator)
        tensor = bits.view(dtype)
        yield from ((f"{dtype}.2d", tensor), (f"{dtype}.0d", tensor[1, 2]), (f"{dtype}.empty", tensor[:0]))


def test_every_dtype_makes_the_round_trip_bit_for_bit(tmp_path):
    tensors = dict(every_dtype()) | {"an odd number of bytes": torch.ones(3, dtype=torch.uint8)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    ours, library = read_tensors(tmp_path / "x.safetensors"), safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert ours.keys() == library.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(ours[name], tensor), name
        assert same_bits(library[name], tensor), name
        assert ours[name].data_ptr() % tensor.itemsize == 0, name
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_files_of_the_library_are_read(tmp_path):
    tensors = dict(every_dtype())
    safetensors.torch.save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "x.safetensors", {"format": "pt"}
    )
    found = read_tensors(tmp_path / "x.safetensors")
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())


def test_views_shared_storage_and_gradients_are_written_as_values(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": whole.T, "row": whole[1], "tied": whole, "also": whole, "p": torch.nn.Parameter(whole[:, ::2])}
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = read_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_data_is_neither_copied_nor_read_ahead(tmp_path):
    tensor = torch.ones(5)
    _, buffer = encode_tensors({"x": tensor})
    tensor[0] = 7  # seen through the buffer only if that is the tensor's own memory
    assert torch.frombuffer(buffer, dtype=torch.float32)[0] == 7
    write_tensors(tmp_path / "x.safetensors", {"x": tensor})
    read_tensors(tmp_path / "x.safetensors")["x"].zero_()
    assert read_tensors(tmp_path / "x.safetensors")["x"][0] == 7


def test_what_the_format_does_not_hold_is_not_written(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileError, match=r"hold no torch.complex64; convert it"):
        write_tensors(path, {"x": torch.ones(1, dtype=torch.complex64)})
    with pytest.raises(FileError, match=r"'\.\./x': a name must not look like a path"):
        write_tensors(path, {"../x": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.ones(1)})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"cannot be written \(No space left on device\); free some space"):
        write_tensors(path, {"x": torch.zeros(1)})
    assert read_tensors(path)["x"] == 1
    assert list(tmp_path.iterdir()) == [path]


# --- hostile files --------------------------------------------------------------------------------------------------


def entry(dtype="F32", shape=(2,), begin=0, end=8, **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def write_raw(path, header, data=b"\0" * 8):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


HOSTILE = {
    "duplicate key": (b'{"a":1,"a":2}', r"the key 'a' is given twice"),
    "duplicate inner key": (b'{"a":{"dtype":"F32","dtype":"F32"}}', r"the key 'dtype' is given twice"),
    "not JSON": (b'{"a":', r"not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', r"not valid JSON"),
    "not an object": (b"[]", r"not a JSON object"),
    "deep": (b"[" * 50_000, r"not valid JSON"),
    "many lists": (b"[" + b"[]," * MAX_PARTS + b"[]]", r"some 800002 values in its JSON, at most 400000"),
    "metadata": ({"__metadata__": {"a": 1}}, r"__metadata__ must hold text only"),
    "entry": ({"a": 3}, r"'a': needs exactly dtype, shape and data_offsets"),
    "unknown field": ({"a": entry(x=1)}, r"needs exactly"),
    "dtype": ({"a": entry(dtype="F33")}, r"dtype 'F33' is not one of F64, F32"),
    "dtype list": ({"a": entry(dtype=["F32"])}, r"is not one of"),
    "negative": ({"a": entry(shape=(-2,))}, r"shape \[-2\] is not a list of possible sizes"),
    "fraction": ({"a": entry(shape=(2.0,))}, r"shape \[2\.0\] is not"),
    "true": ({"a": entry(shape=(True, 2))}, r"shape \[True, 2\] is not"),
    "wrapping": ({"a": entry(shape=(2**32, 2**32), end=0)}, r"is not a list of possible sizes"),
    "wrapping empty": ({"a": entry(shape=(0, 2**40, 2**40), end=0)}, r"is not a list of possible sizes"),
    "many axes": ({"a": entry(shape=(1,) * 65)}, r"is not a list of possible sizes"),
    "offsets": ({"a": entry() | {"data_offsets": [0]}}, r"data_offsets \[0\] is not a pair"),
    "backwards": ({"a": entry(begin=8, end=0)}, r"needs 8 bytes, data_offsets give -8"),
    "size": ({"a": entry(shape=(3,))}, r"shape \[3\] of F32 needs 12 bytes, data_offsets give 8"),
    "outside": ({"a": entry(begin=8, end=16)}, r"'a': data_offsets 8 to 16 leave a hole before"),
    "too long": ({"a": entry(), "b": entry(begin=8, end=16)}, r"data_offsets end at 16, the data has 8 bytes"),
    "too short": ({"a": entry(shape=(1,), end=4)}, r"data_offsets end at 4, the data has 8 bytes"),
    "overlap": ({"a": entry(), "b": entry(shape=(1,), begin=4)}, r"'b': data_offsets 4 to 8 overlap"),
    "same range": ({"a": entry(), "b": entry()}, r"'b': data_offsets 0 to 8 overlap"),
    "empty name": ({"": entry()}, r"a name has 1 to 500 printable"),
    "NUL": ({"a\0b": entry()}, r"'a\\x00b': a name has 1 to 500 printable"),
    "newline": ({"a\nb": entry()}, r"'a\\nb': a name has"),
    "surrogate": ({"\ud800": entry()}, r"'\\ud800': a name has"),
    "long name": ({"a" * 501: entry()}, r"a name has 1 to 500"),
    "absolute": ({"/etc/x": entry()}, r"'/etc/x': a name must not look like a path"),
    "parent": ({"a/../b": entry()}, r"must not look like a path"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_broken_header_is_one_line_with_file_field_and_remedy(tmp_path, case):
    header, message = HOSTILE[case]
    path = write_raw(tmp_path / "x.safetensors", header)
    with pytest.raises(FileError, match=message) as caught:
        read_tensors(path)
    text = str(caught.value)
    assert str(path) in text
    assert text.endswith("; copy or download the file again")
    assert "\n" not in text
    assert len(text) < 700


def test_a_good_header_passes(tmp_path):
    """Otherwise the table above could refuse everything."""
    found = read_tensors(write_raw(tmp_path / "x.safetensors", {"a": entry(), "b": entry(shape=(0, 4), begin=8)}))
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"a": (2,), "b": (0, 4)}


@pytest.mark.parametrize("length", [0, 9, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_file_is_refused(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(FileError, match=r"header length|not valid JSON|empty file"):
        read_tensors(path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3), "b": torch.zeros(2)})
    content = (tmp_path / "x.safetensors").read_bytes()
    for size in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(FileError):
            read_tensors(tmp_path / "cut")


def test_missing_folder_and_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (("none", "No such file"), (".", "not a regular file"), ("pipe", "not a regular file")):
        with pytest.raises(FileError, match=message):
            read_tensors(tmp_path / path)


# As much work as the limits allow.
SLOW = {
    "numbers": lambda: b"[" + b"0," * (MAX_PARTS - 1) + b"0]",
    "objects": lambda: b"[" + b"{}," * (MAX_PARTS // 2 - 1) + b"0]",
    "keys": lambda: b"{" + b",".join(b'"%d":0' % i for i in range(MAX_PARTS // 2)) + b"}",
    "digits": lambda: b"[" + b",".join([b"9" * 4300] * (MAX_JSON // 4301 - 1)) + b"]",
    "name": lambda: b'{"' + b"a" * (MAX_JSON - 10) + b'":0}',
    "shape": lambda: b'{"a":{"dtype":"F32","data_offsets":[0,8],"shape":[' + b"1," * (MAX_PARTS - 20) + b"2]}}",
}


@pytest.mark.parametrize("case", SLOW)
def test_a_crafted_header_costs_at_most_a_second(tmp_path, case):
    header = SLOW[case]()
    assert len(header) <= MAX_JSON
    path = write_raw(tmp_path / "x.safetensors", header)
    start = time.process_time()
    with pytest.raises(FileError) as caught:
        read_tensors(path)
    assert "at most" not in str(caught.value)  # within the limits
    assert time.process_time() - start < 3.0  # a second, and twice as much again for the checking of signatures


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damage_gives_anything_but_a_file_error(tmp_path_factory, data):
    whole = b"".join(map(bytes, encode_tensors({"a.b": torch.arange(3.0), "c": torch.tensor(True)}, {"k": "v"})))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.mktemp("fuzz") / "x"
    path.write_bytes(damaged)
    try:
        tensors = read_tensors(path)
    except FileError:
        return
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(damaged)


# --- folders --------------------------------------------------------------------------------------------------------


def sharded(folder, shards, weight_map):
    for name, tensors in shards.items():
        write_tensors(folder / name, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


ONE, TWO = {"a": torch.ones(1)}, {"b": torch.zeros(2), "c": torch.ones(3)}


def test_one_file(tmp_path):
    write_tensors(tmp_path / "model.safetensors", ONE | TWO)
    assert read_folder(tmp_path).keys() == {"a", "b", "c"}


def test_shards(tmp_path):
    weight_map = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    found = read_folder(sharded(tmp_path, {"1.safetensors": ONE, "2.safetensors": TWO}, weight_map))
    assert found.keys() == {"a", "b", "c"}
    assert torch.equal(found["c"], TWO["c"])


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "1.safetensors", "b": "2.safetensors"}, r"2\.safetensors: holds 'c', unlike .*index\.json says"),
        (
            {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"},
            r"2\.safetensors: holds 'c', unlike",
        ),
        ({"a": "2.safetensors", "b": "2.safetensors", "c": "2.safetensors"}, r"2\.safetensors: lacks 'a'"),
        ({"a": "1.safetensors", "z": "1.safetensors"}, r"1\.safetensors: lacks 'z', which .*index\.json lists"),
        ({"a": "3.safetensors"}, r"3\.safetensors: No such file"),
        ({"a": "../1.safetensors"}, r"weight_map names '\.\./1\.safetensors', not a \.safetensors file of this folder"),
        ({"a": "/etc/passwd"}, r"weight_map names '/etc/passwd'"),
        ({"a": "1.bin"}, r"weight_map names '1\.bin'"),
        ({"a": 3}, r"weight_map names 3"),
        ({}, r"weight_map is missing or empty"),
        ([], r"weight_map is missing or empty"),
    ],
)
def test_shards_are_exactly_what_the_index_lists(tmp_path, weight_map, message):
    sharded(tmp_path, {"1.safetensors": ONE, "2.safetensors": TWO}, weight_map)
    with pytest.raises(FileError, match=message):
        read_folder(tmp_path)


def test_an_index_that_is_not_an_object_or_too_large(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[1]")
    with pytest.raises(FileError, match="must hold an object"):
        read_folder(tmp_path)
    index.write_bytes(b" " * (MAX_JSON + 1))
    with pytest.raises(FileError, match=r"16777217 bytes, more than the 16777216"):
        read_folder(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(FileError, match=r"has no model\.safetensors and no"):
        read_folder(tmp_path)
