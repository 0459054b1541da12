"""Hostile GGUF files: one line that names file and field, within a second, and no memory beyond what the file has."""

import math
import os
import struct
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch

from qkv.checkpoints.gguf import GGUFTensor, encode, from_huggingface, load_gguf, quantise, read_gguf, write_gguf
from qkv.checkpoints.gguf.names import HuggingFace
from qkv.checkpoints.gguf.reader import MAX_ITEMS, MAX_KEYS, MAX_TENSORS
from qkv.data.gguf_vocabulary import read_vocabulary
from qkv.errors import ConfigError, FileError

SECONDS = 3.0  # a second, and twice as much again for the checking of signatures or a busy machine


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def u32(*values):
    return struct.pack(f"<{len(values)}I", *values)


def u64(*values):
    return struct.pack(f"<{len(values)}Q", *values)


def header(n_tensors=0, n_keys=0, version=3):
    return b"GGUF" + u32(version) + u64(n_tensors, n_keys)


def info(name="a", shape=(4,), kind=0, offset=0):
    return text(name) + u32(len(shape)) + u64(*shape) + u32(kind) + u64(offset)


def file_of(*infos, keys=(), data=bytes(64)):
    head = header(len(infos), len(keys)) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


KEY = text("general.alignment") + u32(4)

HOSTILE = {
    "empty": (b"", "the file is empty"),
    "magic": (b"GGML" + bytes(40), "does not begin with 'GGUF'"),
    "version 1": (header(version=1) + bytes(8), "has version 1, and qkv reads 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is big-endian"),
    "49 bytes that hang gguf": (
        header(0, 1) + text("k") + u32(9, 4) + u64(2**60),
        r"the length of 'k' is 115\d+, more",
    ),
    "tensors": (header(2**63), "the number of tensors is 9223372036854775808, more than"),
    "keys": (header(0, 2**40) + bytes(100), "the number of keys is 1099511627776, more than"),
    "key length": (
        header(0, 1) + u64(2**62) + bytes(30),
        "and key 0 would take 4611686018427387912 bytes from byte 24 on",
    ),
    "key length that wraps": (header(0, 1) + u64(2**64 - 8) + bytes(30), "key 0 would take"),
    "key twice": (header(0, 2) + (KEY + u32(32)) * 2, "the key 'general.alignment' is given twice"),
    "key unprintable": (header(0, 1) + text("a\nb") + u32(4, 0), r"key 'a\\nb': a name has 1 to 500 printable"),
    "key not text": (header(0, 1) + text(b"\xff\xfe") + u32(4, 0) + bytes(8), "can't decode byte"),
    "type": (header(0, 1) + text("k") + u32(13, 0) + bytes(8), "'k' has the unknown type 13"),
    "type in a list": (header(0, 1) + text("k") + u32(9, 77) + u64(1) + bytes(8), "'k' has the unknown type 77"),
    "bool": (header(0, 1) + text("k") + u32(7) + b"\2" + bytes(8), "'k' is 2 and must be 0 or 1"),
    "NaN": (header(0, 1) + text("k") + u32(6) + struct.pack("<f", math.nan) + bytes(8), "'k' is nan, not a finite"),
    "nesting": (header(0, 1) + text("k") + (u32(9) + u64(1)) * 1000, "the length of 'k' is 38654705664"),
    "lists of lists": (header(0, 1) + text("k") + u32(9) + (u32(9) + u64(1)) * 1000, "'k' is a list of lists"),
    "string in a list": (header(0, 1) + text("k") + u32(9, 8) + u64(2) + u64(2**63, 0), "'k' would take"),
    "alignment 3": (file_of(info(), keys=[KEY + u32(3)]), "general.alignment is 3 and must be a power of two"),
    "alignment 0": (file_of(info(), keys=[KEY + u32(0)]), "general.alignment is 0"),
    "alignment 2^31": (file_of(info(), keys=[KEY + u32(2**31)]), "general.alignment is 2147483648"),
    "no axes": (file_of(info(shape=())), "'a' has 0 axes"),
    "many axes": (file_of(info(shape=(1,) * 5)), "'a' has 5 axes"),
    "no rows": (file_of(info(shape=(4, 0))), r"'a' has the impossible shape \(0, 4\)"),
    "product that wraps": (file_of(info(shape=(2**32, 2**32, 4))), "'a' has the impossible shape"),
    "size": (file_of(info(shape=(2**40,))), "'a' ends at byte 4398046511104 of the data, which has 64"),
    "a unit of data": (file_of(info(shape=(17,))), "'a' ends at byte 68 of the data, which has 64"),
    "offset that wraps": (file_of(info(offset=2**64 - 64)), "'a' ends at byte 18446744073709551568"),
    "offset into the header": (file_of(info(offset=2**64 - 32)), "'a' ends at byte"),
    "offset unaligned": (file_of(info(offset=4)), "'a' is at 4, not a multiple of the alignment 32"),
    "overlap": (file_of(info("a", (12,)), info("b", (4,), offset=32)), "'b' overlaps 'a'"),
    "same place": (file_of(info("a"), info("b")), "'b' overlaps 'a'"),
    "tensor twice": (file_of(info(), info(offset=32)), "the tensor 'a' is given twice"),
    "unknown kind": (file_of(info(kind=99)), "'a' is of type 99, and qkv reads only F32"),
    "known kind": (file_of(info(kind=10)), "'a' is of type Q2_K, and qkv reads only"),
    "rows of blocks": (file_of(info(shape=(33,), kind=8)), "'a' has rows of 33, not a multiple of its blocks of 32"),
    "path": (file_of(info("../a")), r"'\.\./a': a name must not look like a path"),
    "absolute path": (file_of(info("/a")), "must not look like a path"),
    "name": (file_of(info("a\0")), r"'a\\x00': a name has"),
    "long name": (file_of(info("a" * 501)), "a name has 1 to 500"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_broken_file_is_one_line_with_file_field_and_remedy(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message) as caught:
        read_gguf(path)
    said = str(caught.value)
    assert str(path) in said
    assert said.endswith("; copy or download the file again")
    assert "\n" not in said
    assert len(said) < 700


def test_good_files_pass(tmp_path):
    """Otherwise the table above could refuse everything."""
    for version in (2, 3):
        head = header(2, 1, version) + KEY + u32(64) + info("a", (4, 2)) + info("b", (32,), 8, 64)
        (tmp_path / "x").write_bytes(head + bytes(-len(head) % 64) + bytes(32) + bytes(32) + bytes(34))
        found = read_gguf(tmp_path / "x")
        assert {name: (t.kind, t.shape) for name, t in found.tensors.items()} == {
            "a": ("F32", (2, 4)),
            "b": ("Q8_0", (32,)),
        }
        assert found.metadata == {"general.alignment": 64}
    (tmp_path / "x").write_bytes(header())
    assert read_gguf(tmp_path / "x").tensors == {}


def test_missing_folder_and_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (("none", "No such file"), (".", "not a regular file"), ("pipe", "not a regular file")):
        with pytest.raises(FileError, match=message):
            read_gguf(tmp_path / path)


def test_writing_into_a_tensor_never_changes_the_file(tmp_path):
    write_gguf(tmp_path / "x", {}, {"a": GGUFTensor("F32", (2,), torch.ones(2))})
    read_gguf(tmp_path / "x").tensors["a"].data.zero_()
    assert read_gguf(tmp_path / "x").tensors["a"].data.tolist() == [1, 1]


# --- a small valid model, damaged -----------------------------------------------------------------------------------


def small_model():
    """A Llama of one layer with a vocabulary, as (metadata, tensors)."""
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 7,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }  # fmt: skip
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
              "self_attn.o_proj": (32, 32), "mlp.gate_proj": (32, 32), "mlp.up_proj": (32, 32),
              "mlp.down_proj": (32, 32), "input_layernorm": (32,), "post_attention_layernorm": (32,)}  # fmt: skip
    names = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    names |= {"model.embed_tokens.weight": (7, 32), "model.norm.weight": (32,)}
    state = {name: torch.randn(shape) for name, shape in names.items()}
    metadata, tensors = from_huggingface(HuggingFace(config, state, {}))
    tokens = ["<s>", "a", "b", "ab", "Ġ", "c", "</s>"]
    vocabulary = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [3, 1, 1, 1, 1, 1, 3],
                  "merges": ["a b"], "eos_token_id": 6}  # fmt: skip
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}, encode(tensors, "Q8_0")


def use_all(path):
    """Everything that happens to a file when a model is loaded from it."""
    file = read_gguf(path)
    load_gguf(path)
    read_vocabulary(file.metadata, source=str(path))
    return file


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "x.gguf"
    write_gguf(path, *small_model())
    content = path.read_bytes()
    size = sum(tensor.data.nbytes + -tensor.data.nbytes % 32 for tensor in use_all(path).tensors.values())
    return content, len(content) - size


def attempt(path, content, use):
    """What comes of it: a value or a `FileError` of one line, soon."""
    path.write_bytes(content)
    start, found = time.process_time(), None
    try:
        found = use(path)
    except FileError as error:
        found = error
    assert time.process_time() - start < SECONDS
    assert "\n" not in str(found) or not isinstance(found, FileError)
    return found


def test_every_truncation_is_refused(tmp_path, small):
    content, n_header = small
    for size in (*range(n_header), *range(n_header, len(content), 37)):
        assert isinstance(attempt(tmp_path / "x", content[:size], read_gguf), FileError), size


def flipped(content, bits):
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def test_every_flipped_bit_of_a_header_is_refused_or_another_valid_file(tmp_path):
    """A small header that has each part of one."""
    head = header(2, 3) + KEY + u32(32) + text("k") + u32(9, 8) + u64(2) + text("ab") + text("é") + text("f") + u32(7)
    head += b"\1" + info("a", (4, 2)) + info("b", (32,), 8, 32)
    content = head + bytes(-len(head) % 32) + bytes(32 + 34)
    found = [type(attempt(tmp_path / "x", damaged, read_gguf)) for damaged in flipped(content, range(8 * len(head)))]
    refused = sum(kind is FileError for kind in found)
    assert len(found) > refused > len(found) / 2  # most bits matter; another letter in a name does not
    tracemalloc.start()
    for damaged in flipped(content, range(0, 8 * len(head), 11)):
        attempt(tmp_path / "x", damaged, read_gguf)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.filterwarnings("ignore:.*does not say how words are split")
def test_flipped_bits_of_a_model_are_refused_or_another_model(tmp_path, small):
    """Config, names, shapes and vocabulary: all that happens until there is a model."""
    content, n_header = small
    found = [
        type(attempt(tmp_path / "x", damaged, use_all)) for damaged in flipped(content, range(3, 8 * n_header, 61))
    ]
    refused = sum(kind is FileError for kind in found)
    assert len(found) > refused > len(found) / 2


def test_random_bytes_behind_the_magic(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        noise = torch.randint(0, 256, (200,), generator=generator, dtype=torch.uint8).numpy().tobytes()
        counts = u64(1, 1) if noise[0] % 2 else b""
        content = b"GGUF" + u32(3) + counts + noise
        assert isinstance(attempt(tmp_path / "x", content, read_gguf), FileError)


# As much work as the limits allow.
SLOW = {
    "empty texts": lambda: header(0, 1) + text("k") + u32(9, 8) + u64(MAX_ITEMS) + bytes(8 * MAX_ITEMS),
    "numbers": lambda: header(0, 1) + text("k") + u32(9, 10) + u64(MAX_ITEMS) + b"\xff" * (8 * MAX_ITEMS),
    "keys": lambda: header(0, MAX_KEYS) + b"".join(text(f"k{i}") + u32(4, 1) for i in range(MAX_KEYS)),
    "tensors": lambda: file_of(*(info(f"t{i}", (8,), 0, 32 * i) for i in range(MAX_TENSORS)),
                               data=bytes(32 * MAX_TENSORS)),
    "one long text": lambda: header(0, 1) + text("k") + u32(8) + text("é" * (16 << 20)),
}  # fmt: skip


_TIMES = """
import sys, time
from pathlib import Path
from qkv.checkpoints.gguf import read_gguf
for path in sys.argv[1:]:
    start = time.process_time()
    read_gguf(Path(path))
    print(time.process_time() - start)
"""


def test_a_crafted_header_costs_at_most_a_second(tmp_path):
    """In a process of its own, where no signatures are checked."""
    paths = [tmp_path / str(i) for i in range(len(SLOW))]
    for path, make in zip(paths, SLOW.values(), strict=True):
        path.write_bytes(make())
    done = subprocess.run([sys.executable, "-c", _TIMES, *map(str, paths)], capture_output=True, text=True, check=True)
    times = dict(zip(SLOW, map(float, done.stdout.split()), strict=True))
    assert max(times.values()) < SECONDS, times


def test_what_is_beyond_the_limits_is_refused_at_once(tmp_path):
    path = tmp_path / "x"
    for content, message in (
        (header(0, 1) + text("k") + u32(9, 0) + u64(MAX_ITEMS + 1) + bytes(MAX_ITEMS + 1), "the length of 'k'"),
        (header(0, MAX_KEYS + 1) + bytes(13 * MAX_KEYS + 13), "the number of keys"),
        (header(MAX_TENSORS + 1, 0) + bytes(24 * MAX_TENSORS + 24), "the number of tensors"),
    ):
        path.write_bytes(content)
        with pytest.raises(FileError, match=message):
            read_gguf(path)


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"k": 2**64}, {}, "'k' holds what GGUF cannot: 18446744073709551616"),
        ({"k": None}, {}, "'k' holds what GGUF cannot: None"),
        ({"k": [1, "a"]}, {}, "'k' holds what GGUF cannot: 1"),
        ({"../k": 1}, {}, "must not look like a path"),
        ({"general.alignment": 12}, {}, "general.alignment is 12"),
        ({}, {"a": GGUFTensor("Q8_0", (2, 32), torch.zeros(2, 33, dtype=torch.uint8))}, "is not how"),
        ({}, {"a": GGUFTensor("F32", (2,), torch.zeros(2).half())}, "is not how"),
        ({}, {"a": GGUFTensor("F32", (), torch.zeros(()))}, "has 0 axes"),
    ],
)
def test_what_the_format_does_not_hold_is_not_written(tmp_path, metadata, tensors, message):
    (tmp_path / "x").write_bytes(b"before")
    with pytest.raises(FileError, match=message):
        write_gguf(tmp_path / "x", metadata, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"before"


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_gguf(path, {"k": 1}, {})

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"cannot be written \(No space left on device\); free some space"):
        write_gguf(path, {"k": 2}, {})
    assert read_gguf(path).metadata == {"k": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_quantised_says_so():
    with pytest.raises(ConfigError, match="rows of 33 are not whole blocks of 32; Q4_0 cannot"):
        quantise(torch.zeros(2, 33), "Q4_0")
    with pytest.raises(ConfigError, match="does not quantise to Q6_K; choose one of Q8_0, Q4_0, Q4_1"):
        quantise(torch.zeros(2, 256), "Q6_K")
    with pytest.raises(ConfigError, match="not finite"):
        quantise(torch.full((1, 32), math.inf), "Q4_1")
    blocks = {"a.weight": GGUFTensor("Q4_1", (1, 32), quantise(torch.ones(1, 32), "Q4_1"))}
    assert encode(blocks, "Q4_1") == blocks
    with pytest.raises(ConfigError, match=r"a\.weight: is Q4_1 and cannot become Q8_0; expand it first"):
        encode(blocks, "Q8_0")
    with pytest.raises(ConfigError, match="writes no GGUF tensors of kind 'Q4_K'"):
        encode(blocks, "Q4_K")
