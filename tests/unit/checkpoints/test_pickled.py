"""Pickled weights: only when asked for, only tensors, and never code."""

import io
import json
import os
import zipfile

import pytest
import torch

from qkv.checkpoints import read_folder
from qkv.checkpoints.pickled import read_pickled
from qkv.errors import FileError


class Touch:
    """Runs a command when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickles_are_refused_unless_asked_for(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileError, match=r"a pickle can run code; use model\.safetensors, or allow_pickle=True"):
        read_folder(tmp_path)
    found = read_folder(tmp_path, allow_pickle=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_pickled_shards(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "1.bin")
    torch.save({"b": torch.zeros(1)}, tmp_path / "2.bin")
    index = {"weight_map": {"a": "1.bin", "b": "2.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert read_folder(tmp_path, allow_pickle=True).keys() == {"a", "b"}
    with pytest.raises(FileError, match=r"allow_pickle=True"):
        read_folder(tmp_path)


def test_code_is_not_run(tmp_path):
    torch.save({"a": Touch(tmp_path / "ran")}, tmp_path / "x.bin")
    with pytest.raises(FileError, match=r"not readable as weights only"):
        read_pickled(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()


def compressed(path):
    plain = io.BytesIO()
    torch.save({"a": torch.zeros(1_000_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save({"a": 3}, path), r"entry 'a' is not a named tensor"),
        (lambda path: torch.save({1: torch.ones(1)}, path), r"entry 1 is not a named tensor"),
        (lambda path: torch.save(torch.ones(1), path), r"holds a Tensor, not a dict of tensors"),
        (
            lambda path: torch.save({"a": torch.ones(1).expand(1 << 40)}, path),
            r"'a' is larger than the file of \d+ bytes",
        ),
        (lambda path: torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False), r"not a zip file"),
        (lambda path: None, r"No such file or directory; check the path"),
        (compressed, r"a compressed zip file"),
    ],
)
def test_anything_else_than_plain_tensors_is_refused(tmp_path, write, message):
    write(tmp_path / "x.bin")
    with pytest.raises(FileError, match=message):
        read_pickled(tmp_path / "x.bin")


def test_damage_anywhere_is_a_file_error_or_harmless(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "whole.bin")
    content = (tmp_path / "whole.bin").read_bytes()
    refused = 0
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "x.bin").write_bytes(damaged)
        try:
            read_pickled(tmp_path / "x.bin")
        except FileError:
            refused += 1
    assert refused > 20
