"""Plain data out of a pickle that is never unpickled."""

import os
import pickle
import time

import pytest

from qkv.checkpoints.opcodes import MAX_INSTRUCTIONS, Opaque, read_plain
from qkv.errors import FileError


class Touch:
    """Runs a command when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_plain_data_are_read_and_nothing_is_run(tmp_path):
    data = {"a": 1, "b": [1.5, "x", None, (True,)], "c": {2: "y", 3: "z"}}
    (tmp_path / "x").write_bytes(pickle.dumps(data | {"d": Touch(tmp_path / "ran")}, protocol=2))
    found = read_plain(tmp_path / "x")
    assert isinstance(found.pop("d"), Opaque)
    assert found == data
    assert not (tmp_path / "ran").exists()


HEAD, KEY = b"\x80\x02}(", b"X\x01\0\0\0k"
DEEP = b")" + b"\x85" * 200_000  # tuples in one another
DOUBLED = b")" + b"".join(bytes([113, i, 104, i, 0x86]) for i in range(60))  # each twice in the next


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02}K\1K\2u.", "a mark is missing"),
        (b"\x80\x02](" + b"N" * MAX_INSTRUCTIONS + b"e.", f"more than {MAX_INSTRUCTIONS} instructions"),
        (HEAD + KEY + DEEP + b"u.", "more than 8 levels"),
        (HEAD + DEEP + b"Nu.", "a key is no text and no number"),  # whose hash would end the process
        (HEAD + KEY + DOUBLED + b"u.", "too many places|levels"),
        (HEAD + KEY + b"]q\0(h\0eu.", "more than 8 levels"),  # a list in itself
        (b"\x80\x02]q\0.", "holds a list and must hold a dict"),
        (b"\x80\x02}", "no pickle of plain data"),
    ],
)
def test_hostile_ones_are_refused_at_once(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    start = time.process_time()
    with pytest.raises(FileError, match=message):
        read_plain(tmp_path / "x")
    assert time.process_time() - start < 30  # the largest takes 1 to 3 s; what grows with its square would take hours
