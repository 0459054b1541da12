import contextlib
import gzip
import hashlib
import io
import os
import subprocess
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv import fetch as fetching
from qkv.errors import ConfigError, FileError
from qkv.fetch import cache_dir, fetch, read_archive, write_atomic

HASH = "0" * 64


def make_tar(path: Path, files: dict[str, bytes], *others: tarfile.TarInfo) -> str:
    """A .tar.gz; the SHA-256 of it."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in others:
            archive.addfile(info)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package index; the real pip reads it, and there is no network."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def no_pip(*args: object, **kwargs: object) -> None:
    raise AssertionError("pip was started")


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("QKV_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path("/home/ada/.cache/qkv")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert cache_dir() == Path("/var/x/qkv")
    monkeypatch.setenv("QKV_CACHE", "/var/q")
    assert cache_dir() == Path("/var/q")


HOSTILE = {
    "setup.py": "{}",
    "setup.py and setuptools": "{}",
    "a backend inside the package": "{}\ndef prepare_metadata_for_build_wheel(*a, **k): pass",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_of_a_source_archive_runs(kind: str, index: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    code = HOSTILE[kind].format(f"open({str(ran)!r}, 'w').close()").encode()
    files = {"data-1.0/data/a.txt": b"hello"}
    if kind == "a backend inside the package":
        files["data-1.0/pyproject.toml"] = b'[build-system]\nrequires=[]\nbuild-backend="own"\nbackend-path=["."]'
        files["data-1.0/own.py"] = code
    else:
        files["data-1.0/setup.py"] = code
    if kind == "setup.py and setuptools":
        files["data-1.0/pyproject.toml"] = b'[build-system]\nrequires=["setuptools"]'
    sha256 = make_tar(index / "data-1.0.tar.gz", files)
    archive = fetch("data", "1.0", sha256, cache=tmp_path / "cache")
    assert read_archive(archive, "*.txt") == [("data-1.0/data/a.txt", b"hello")]
    assert not ran.exists()


def test_the_second_time_needs_no_pip_and_damage_is_repaired(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = make_tar(index / "some.data-1.0.tar.gz", {"some.data-1.0/setup.py": b""})
    first = fetch("Some_Data", "1.0", sha256, cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", no_pip)
        assert fetch("Some_Data", "1.0", sha256, cache=tmp_path / "cache") == first
        first.write_bytes(first.read_bytes()[:-1])
        with pytest.raises(AssertionError, match="pip was started"):
            fetch("Some_Data", "1.0", sha256, cache=tmp_path / "cache")
    assert fetch("Some_Data", "1.0", sha256, cache=tmp_path / "cache") == first
    assert hashlib.sha256(first.read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize("chosen", ["wheel", "source"])
def test_the_hash_chooses_between_wheel_and_source_archive(
    chosen: str, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"METADATA": b"Metadata-Version: 2.1\nName: data\nVersion: 1.0\n", "WHEEL": b"Wheel-Version: 1.0\n"}
    wheel = {f"data-1.0.dist-info/{name}": data for name, data in facts.items()}
    make_zip(index / "data-1.0-py3-none-any.whl", {"a.txt": b"wheel"} | wheel)
    make_tar(index / "data-1.0.tar.gz", {"data-1.0/a.txt": b"source", "data-1.0/setup.py": b""})
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in index.iterdir()}
    page = index / "index.html"
    page.write_text("".join(f'<a href="{name}#sha256={sha256}">{name}</a>' for name, sha256 in hashes.items()))
    monkeypatch.setenv("PIP_FIND_LINKS", str(page))
    name = "data-1.0.tar.gz" if chosen == "source" else "data-1.0-py3-none-any.whl"
    archive = fetch("data", "1.0", hashes[name], cache=tmp_path / "cache")
    assert [data for _, data in read_archive(archive, "a.txt")] == [chosen.encode()]


def test_a_wrong_hash(index: Path, tmp_path: Path) -> None:
    sha256 = make_tar(index / "data-1.0.tar.gz", {"a.txt": b"hello"})
    with pytest.raises(FileError, match=f"SHA-256 {sha256[:12]}.*asks for {HASH[:12]}.*correct `sha256`"):
        fetch("data", "1.0", HASH, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / HASH).iterdir())


def test_what_pip_got_is_verified_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        got = Path(command[command.index("--dest") + 1])
        got.mkdir()
        (got / "data-1.0.tar.gz").write_bytes(b"other")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", careless)
    with pytest.raises(FileError, match="the download has SHA-256"):
        fetch("data", "1.0", HASH, cache=tmp_path)


def test_no_such_package(index: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"data==1\.0: pip could not download it \(Could not find a version"):
        fetch("data", "1.0", HASH, cache=tmp_path / "cache")


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", "/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    with pytest.raises(FileError, match="needs pip; install it"):
        fetch("data", "1.0", HASH, cache=tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="point QKV_CACHE elsewhere"):
        fetch("data", "1.0", HASH, cache=tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "version", "sha256", "key"),
    [
        ("--index-url=x", "1.0", HASH, "name"),
        ("data @ https", "1.0", HASH, "name"),
        ("data\n-r x", "1.0", HASH, "name"),
        ("data", "1.0 --pre", HASH, "version"),
        ("data", "", HASH, "version"),
        ("data", "1.0", "abc", "sha256"),
        ("data", "1.0", "../" + "0" * 61, "sha256"),
    ],
)
def test_only_a_package_is_fetched(name: str, version: str, sha256: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"package {key} .* does not have the form"):
        fetch(name, version, sha256)


FILES = {"p/b/two.txt": b"2", "p/a/one.txt": b"1", "p/a/one.md": b"m"}


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.txt", ["p/a/one.txt", "p/b/two.txt"]),
        ("one.*", ["p/a/one.md", "p/a/one.txt"]),
        ("*/b/*.txt", ["p/b/two.txt"]),
        ("b/*", []),
    ],
)
def test_read_archive(kind: str, pattern: str, names: list[str], tmp_path: Path) -> None:
    path = tmp_path / "archive"
    make_tar(path, FILES) if kind == "tar" else make_zip(path, FILES)
    assert read_archive(path, pattern) == [(name, FILES[name]) for name in names]


def test_links_and_holes_are_not_read(tmp_path: Path) -> None:
    link, hole = tarfile.TarInfo("link.txt"), tarfile.TarInfo("hole.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
    hole.type = tarfile.GNUTYPE_SPARSE
    make_tar(tmp_path / "a.tar.gz", {"a.txt": b"hello"}, link, hole)
    assert read_archive(tmp_path / "a.tar.gz", "*") == [("a.txt", b"hello")]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("link.txt")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "a.txt")
        archive.writestr("a.txt", "hello")
    assert read_archive(tmp_path / "a.zip", "*") == [("a.txt", b"hello")]


def bomb_header(path: Path) -> None:
    """A header that announces 2**60 bytes of attributes."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 60
    path.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 25)))


BOMBS = {
    "tar": lambda path: make_tar(path, {"a": bytes(1 << 26)}),
    "tar that is not asked for": lambda path: make_tar(path, {"b": bytes(1 << 26)}),
    "tar header": bomb_header,
    "zip": lambda path: make_zip(path, {"a": bytes(1 << 26)}),
    "zip of many": lambda path: make_zip(path, {f"{i}/a": bytes(1 << 21) for i in range(32)}),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_are_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    BOMBS[kind](path)
    start = time.process_time()
    with pytest.raises(FileError, match=r"bomb: not a readable .*expands to far more than its size"):
        read_archive(path, "a")
    assert time.process_time() - start < 1


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_too_many_members(make: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MAX_MEMBERS", 2)
    (make_tar if make is make_tar else make_zip)(tmp_path / "x", FILES)
    with pytest.raises(FileError, match="more than 2 members"):
        read_archive(tmp_path / "x", "*")


def test_an_unusual_compression(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", "a")
    with pytest.raises(FileError, match="an unusual compression"):
        read_archive(tmp_path / "x", "*")


def test_not_an_archive(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello")
    with pytest.raises(FileError, match=r"x: not a readable .*get it again"):
        read_archive(tmp_path / "x", "*")
    with pytest.raises(FileError, match="No such file"):
        read_archive(tmp_path / "y", "*")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    folder = tmp_path_factory.mktemp("samples")
    make_tar(folder / "tar", FILES)
    make_zip(folder / "zip", FILES)
    packed = (folder / "tar").read_bytes()
    return folder, [packed, gzip.decompress(packed), (folder / "zip").read_bytes()]


@settings(max_examples=150, deadline=1000)
@given(data=st.data(), kind=st.integers(0, 2))
def test_damaged_archives_raise_only_file_errors(
    samples: tuple[Path, list[bytes]], data: st.DataObject, kind: int
) -> None:
    folder, originals = samples
    content = bytearray(originals[kind])
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(len(content), 2000) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(content[: data.draw(st.integers(0, len(content)))])
    (folder / "damaged").write_bytes(gzip.compress(damaged) if kind == 1 else damaged)
    with contextlib.suppress(FileError):
        read_archive(folder / "damaged", "*")


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"old"
