import gzip
import hashlib
import io
import json
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from qkv.data import SHAKESPEARE, FilesConfig, PackageConfig, SourceConfig, VectorFilesConfig
from qkv.errors import ConfigError, FileError


def texts(path: Path, **fields: str) -> list[str]:
    return list(FilesConfig(path=str(path), **fields).documents())


def test_a_folder_is_read_in_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("1")
    (tmp_path / "c.md").write_text("2")
    (tmp_path / "a.jsonl").write_text('{"text": "3"}\n\n{"text": ""}\n{"text": "4"}')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert texts(tmp_path) == ["3", "4", "1", "2"]


def test_a_single_file_may_have_any_suffix(tmp_path: Path) -> None:
    (tmp_path / "poem.tex").write_bytes("\ufeffé\r\nb\rc\n".encode())
    assert texts(tmp_path / "poem.tex") == ["é\nb\nc\n"]


def test_a_field_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x\\r\\n\\u00e9", "text": 1}\n')
    assert texts(tmp_path / "a.jsonl", field="body") == ["x\né"]


def test_tables_of_texts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x\r\ny"}, {"text": ""}, {"text": "é", "n": 1}]))
    assert texts(tmp_path / "a.json") == ["x\ny", "é"]
    (tmp_path / "a.CSV").write_text('n,body\n1,"x, ""y""\nz"\n2,é\n')
    assert texts(tmp_path / "a.CSV", field="body") == ['x, "y"\nz', "é"]


@pytest.mark.parametrize(
    ("name", "content", "want"), [("a.txt", "x\ny", ["x\ny"]), ("a.jsonl", '{"text": "x"}\n', ["x"])]
)
def test_files_that_are_packed(tmp_path: Path, name: str, content: str, want: list[str]) -> None:
    for file in (f"{name}.gz", name):  # whatever it is called
        (tmp_path / file).write_bytes(gzip.compress(content.encode()))
        assert texts(tmp_path / file) == want


def test_several_files_and_patterns(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.log"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    several = FilesConfig.from_dict({"path": [str(tmp_path / "c.log"), str(tmp_path / "?.txt"), str(tmp_path)]})
    assert list(several.documents()) == ["c.log", "a.txt", "b.txt"]
    with pytest.raises(FileError, match=r"\*\.md: no such file"):
        texts(tmp_path / "*.md")


def test_what_is_left_out_of_a_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    for name in ("A.TXT", ".hidden.txt", "page.html", ".git/a.txt", "b.Md"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["A.TXT", "b.Md"]
    (note,) = FilesConfig(path=str(tmp_path)).notes()
    assert note == f"{tmp_path}: 2 files to read; left out: 2 .txt, 1 .html"


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nowhere: no such file or folder; give the path"):
        texts(tmp_path / "nowhere")
    (tmp_path / "a.pdf").write_text("")
    with pytest.raises(FileError, match=re.escape("the folder has no .jsonl, .md, .txt file")):
        texts(tmp_path)
    with pytest.raises(FileError, match=re.escape("the folder has no .npy file")):
        list(VectorFilesConfig(path=str(tmp_path)).documents())


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"abc\xffd", "a.txt: byte 3 is not UTF-8 text; convert"),
        ("a.txt", b"%PDF-1.7\n\xff", "a.txt: is a PDF file, not text; write its text to a .txt"),
        ("a.zip", b"PK\3\4\xff", "a.zip: is a ZIP file, not text"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-9], "a.txt.gz: ends too early or is damaged"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-1] + b"x", "a.txt.gz: ends too early or is damaged"),
        ("a.txt.gz", b"\x1f\x8bno", "a.txt.gz: ends too early or is damaged"),
        ("a.parquet", b"PAR1", "a.parquet: tables in .parquet are not read; write JSON Lines, for example with pandas"),
        ("a.json", b"{}", "a.json: needs a list of objects with texts"),
        ("a.json", b'[{"text": "a"}, "b"]', "a.json: needs a list of objects"),
        ("a.json", b"[", "a.json: not valid JSON"),
        ("a.json", b'[{"body": "a"}]', "a.json, item 1: needs an object with the key 'text', found body; set `field`"),
        ("a.csv", b"body,n\na,1\n", "a.csv, row 1: needs an object with the key 'text', found body, n; set `field`"),
        ("a.csv", b"text;n\na;1\n", "a.csv: its columns stand between ';'; write it with commas"),
        ("a.csv", b"text\tn\na\t1\n", "a.csv: its columns stand between '\\t'; write it with commas"),
        ("a.csv", b'text\n"a', "a.csv: not valid CSV"),
        ("a.txt", b"ab\x00", "a.txt: a zero at byte 2, so this is not a text file"),
        ("a.jsonl", b'{"text": "a"}\n{"text": }', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"body": "a"}', "line 1: needs an object with the key 'text', found body; set `field`"),
        ("a.jsonl", b"[1]", "line 1: needs an object, found list; write one object per line"),
        ("a.jsonl", b'{"text": 7}', "line 1: 'text' must be a string, found int"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: 'text' has half a surrogate pair"),
        ("a.jsonl", b'{"text": "a\\u0000"}', "line 1: a zero at byte 1"),
        ("a.jsonl", b'\n{"text": "\xff"}', "line 2: byte 10 is not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl", b"9" * 10_000, "line 1: not valid JSON"),
    ],
)
def test_what_is_not_text(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FileError, match=re.escape(message)):
        texts(tmp_path / name)


# --- packages ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackageConfig:
    """A package that is in the cache already."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, text in {"d/b.txt": b"two", "d/a.txt": b"one\r\n", "d/bad.bin": b"\xff", "d/empty.txt": b""}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    sha256 = hashlib.sha256(content.getvalue()).hexdigest()
    place = tmp_path / "packages" / sha256
    place.mkdir(parents=True)
    (place / "data-1.0.tar.gz").write_bytes(content.getvalue())
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    return PackageConfig(name="data", version="1.0", sha256=sha256, files="*.txt")


def test_a_package(package: PackageConfig) -> None:
    assert list(package.documents()) == ["one\n", "two"]
    assert SourceConfig.from_dict(package.to_dict()) == package


def test_files_that_a_package_does_not_have(package: PackageConfig) -> None:
    changed = package.to_dict() | {"files": "*.csv"}
    with pytest.raises(FileError, match=re.escape("data-1.0.tar.gz: no file matches '*.csv'; correct `files`")):
        list(SourceConfig.from_dict(changed).documents())
    changed = package.to_dict() | {"files": "*.bin"}
    with pytest.raises(FileError, match=re.escape("data-1.0.tar.gz: d/bad.bin: byte 0 is not UTF-8")):
        list(SourceConfig.from_dict(changed).documents())


def test_a_package_config_is_checked_when_it_is_made() -> None:
    with pytest.raises(ConfigError, match="package sha256 'x' does not have the form"):
        PackageConfig(name="a", version="1", sha256="x", files="*")


def test_shakespeare() -> None:
    try:
        documents = list(SHAKESPEARE.documents())
    except FileError as error:
        pytest.skip(f"the package cannot be had here: {error}")
    assert (len(documents), sum(map(len, documents))) == (42, 5_057_198)
    assert documents[1].startswith("ANTONY AND CLEOPATRA\n\nby William Shakespeare\n")
    everything = "\n".join(documents).lower()
    for word in ("gutenberg", "copyright", "http", "small print", "milton"):
        assert word not in everything


# --- vectors ----------------------------------------------------------------------------------------------------------


def vectors(path: Path) -> list[np.ndarray]:
    return list(VectorFilesConfig(path=str(path)).documents())


def test_vectors(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(12, dtype=np.float64).reshape(2, 3, 2))
    np.save(tmp_path / "b.npy", np.ones((4, 2), dtype=">f2"))
    found = vectors(tmp_path)
    assert [array.shape for array in found] == [(3, 2), (3, 2), (4, 2)]
    assert all(array.dtype == np.dtype("=f4") for array in found)
    assert found[1].tolist() == [[6, 7], [8, 9], [10, 11]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 2), int), "needs floats (T, features) or (N, T, features), found int64 (2, 2)"),
        (np.ones(3), "needs floats (T, features) or (N, T, features), found float64 (3,)"),
        (np.ones((2, 2), complex), "needs floats (T, features) or (N, T, features), found complex128 (2, 2)"),
        (
            np.array([[[0.0, 1]], [[2, np.nan]]]),
            "sequence 1 has a value that is not finite in float32 at (step, feature) (0, 1)",
        ),
        (np.array([[1e300, 0]]), "sequence 0 has a value that is not finite in float32 at (step, feature) (0, 0)"),
    ],
)
def test_what_is_not_vectors(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(FileError, match=re.escape(f"a.npy: {message}")):
        vectors(tmp_path)


def test_vectors_of_two_widths(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    np.save(tmp_path / "b.npy", np.ones((2, 4)))
    with pytest.raises(FileError, match=r"b\.npy: 4 features, but a\.npy has 3; give all the same width"):
        vectors(tmp_path)


def test_arrays_of_objects_are_refused_plainly(tmp_path):
    np.save(tmp_path / "a.npy", np.array([np.ones((2, 3)), np.ones((4, 3))], dtype=object), allow_pickle=True)
    with pytest.raises(FileError, match=r"\(Python objects, no floats; sequences of several lengths need a file"):
        list(VectorFilesConfig(path=str(tmp_path)).documents())


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


PICKLE = io.BytesIO()
np.save(PICKLE, np.array([[{}]], dtype=object), allow_pickle=True)
ARCHIVE = io.BytesIO()
np.savez(ARCHIVE, a=np.ones((2, 2)))


def test_a_pickle_does_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "a.npy").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(FileError, match=r"a\.npy: not a readable"):
        vectors(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        PICKLE.getvalue(),
        ARCHIVE.getvalue(),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1099511627776)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4)}"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4)}"),
        npy("{'descr': 'zz', 'fortran_order': False, 'shape': (0, 4)}"),
        npy("((((("),
    ],
)
def test_damaged_and_hostile_vectors(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(FileError, match=r"a\.npy: (not a readable \.npy array|needs floats)"):
        vectors(tmp_path)
