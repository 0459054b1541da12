import base64
import contextlib
import gzip
import hashlib
import io
import os
import subprocess
import tarfile
import threading
import time
import zipfile
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv import fetch as fetching
from qkv.disk import write_whole
from qkv.errors import ConfigError, FileError
from qkv.fetch import cache_dir, fetch, read_archive

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


@dataclass
class Index:
    """A package index in a folder, as PEP 503 has it; there is no other network."""

    folder: Path

    @property
    def address(self) -> str:
        return self.folder.as_uri()

    def add(self, package: str, name: str, content: bytes, listed: str | None = None) -> str:
        """A file; its SHA-256, which is also what the page says where nothing else is `listed`."""
        place = self.folder / package
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        with (place / "index.html").open("a") as page:
            page.write(
                f'<a href="{quote(name)}#sha256={listed or sha256}" data-requires-python="&gt;=3">{name}</a><br/>'
            )
        return sha256


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    (tmp_path / "index").mkdir()
    made = Index(tmp_path / "index")
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", made.address)
    return made


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("QKV_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path("/home/ada/.cache/qkv")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert cache_dir() == Path("/var/x/qkv")
    monkeypatch.setenv("QKV_CACHE", "/var/q")
    assert cache_dir() == Path("/var/q")


def test_the_second_time_needs_no_index_and_damage_is_repaired(index: Index, tmp_path: Path) -> None:
    sha256 = index.add("some-data", "some.data-1.0.tar.gz", b"hello")
    first = fetch("Some_Data", "1.0", sha256, cache=tmp_path / "cache")
    assert first.read_bytes() == b"hello"
    page = (index.folder / "some-data" / "index.html").rename(tmp_path / "page")
    assert fetch("Some_Data", "1.0", sha256, cache=tmp_path / "cache") == first
    first.write_bytes(b"hell")
    with pytest.raises(FileError, match="cannot find the file"):
        fetch("Some_Data", "1.0", sha256, cache=tmp_path / "cache")
    page.rename(index.folder / "some-data" / "index.html")
    assert fetch("Some_Data", "1.0", sha256, cache=tmp_path / "cache").read_bytes() == b"hello"


def test_the_hash_chooses_among_the_files_of_a_package(index: Index, tmp_path: Path) -> None:
    index.add("data", "data-0.9.tar.gz", b"old")
    wheel = index.add("data", "data-1.0+x-py3-none-any.whl", b"wheel")
    source = index.add("data", "data-1.0.tar.gz", b"source")
    for sha256, name in ((wheel, "data-1.0+x-py3-none-any.whl"), (source, "data-1.0.tar.gz")):
        assert fetch("data", "1.0", sha256, cache=tmp_path / "cache").name == name


def test_settings_come_from_the_file_of_pip_and_the_other_indexes(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = index.add("data", "data-1.0.tar.gz", b"hello")
    (tmp_path / "empty").mkdir()
    settings = f"[global]\nindex-url = {(tmp_path / 'empty').as_uri()}\nextra-index-url = {index.address}/\n"
    (tmp_path / "pip.conf").write_text(settings)
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert fetch("data", "1.0", sha256, cache=tmp_path / "cache").read_bytes() == b"hello"


def test_without_pip_the_environment_counts(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", "/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    sha256 = index.add("data", "data-1.0.tar.gz", b"hello")
    assert fetch("data", "1.0", sha256, cache=tmp_path / "cache").read_bytes() == b"hello"


def test_a_server_that_asks_who_is_there(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    sha256 = index.add("data", "data-1.0.tar.gz", b"hello")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=index.folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://ada:a%40b@127.0.0.1:{server.server_port}")
        assert fetch("data", "1.0", sha256, cache=tmp_path / "cache").read_bytes() == b"hello"
        server.shutdown()
    assert seen == ["Basic " + base64.b64encode(b"ada:a@b").decode()] * 2


@pytest.mark.parametrize("npm", [True, False], ids=["npm says", "without npm"])
def test_a_package_of_npm(npm: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "registry" / "some-data" / "-"
    place.mkdir(parents=True)
    sha256 = make_tar(place / "some-data-1.0.0.tgz", {"package/a.txt": b"hello"})
    address = (tmp_path / "registry").as_uri() + "/"

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if not npm:
            raise FileNotFoundError(command[0])
        said = f"registry={address}\ncafile=null\nhttps-proxy=null\n"
        return subprocess.CompletedProcess(command, 0, said if command[:3] == ["npm", "config", "get"] else "", "")

    monkeypatch.setattr(subprocess, "run", run)
    for key in [key for key in os.environ if key.lower().startswith("npm_config_")]:
        monkeypatch.delenv(key)
    if not npm:
        with pytest.raises(FileError, match=r"no npm registry is known, .* set npm_config_registry"):
            fetch("some-data", "1.0.0", sha256, registry="npm", cache=tmp_path / "cache")
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", address)
    path = fetch("some-data", "1.0.0", sha256, registry="npm", cache=tmp_path / "cache")
    assert path.name == "some-data-1.0.0.tgz"
    assert read_archive(path, "*.txt") == [("package/a.txt", b"hello")]
    with pytest.raises(FileError, match=f"the download has SHA-256 {sha256[:12]}.*say {HASH[:12]}"):
        fetch("some-data", "1.0.0", HASH, registry="npm", cache=tmp_path / "cache")


def test_no_file_of_that_hash(index: Index, tmp_path: Path) -> None:
    index.add("data", "data-1.0.tar.gz", b"hello")
    with pytest.raises(FileError, match=r"data==1\.0: cannot find .*SHA-256 0{12}.*lists no such file.*`sha256`"):
        fetch("data", "1.0", HASH, cache=tmp_path / "cache")
    with pytest.raises(FileError, match=r"other==1\.0: cannot find .*No such file.*check the network"):
        fetch("other", "1.0", HASH, cache=tmp_path / "cache")


def test_a_download_is_said_before_it_begins(
    index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = index.add("data", "data-1.0.tar.gz", b"hello")
    said, settings = [], {"index-url": index.address}
    monkeypatch.setattr(fetching, "_pip_settings", lambda: said.append(capsys.readouterr().err) or settings)
    with pytest.raises(FileError):
        fetch("data", "1.0", HASH, cache=tmp_path / "cache")
    assert said == ["downloading data 1.0\n"]
    for err in ("downloading data 1.0\n", ""):  # the second time it is there
        said.clear()
        fetch("data", "1.0", sha256, cache=tmp_path / "cache")
        assert "".join(said) + capsys.readouterr().err == err


def test_a_wrong_hash(index: Index, tmp_path: Path) -> None:
    sha256 = index.add("data", "data-1.0.tar.gz", b"hello", listed=HASH)
    with pytest.raises(FileError, match=f"the download has SHA-256 {sha256[:12]}.*say {HASH[:12]}"):
        fetch("data", "1.0", HASH, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / HASH).iterdir())


def test_a_download_without_end(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MAX_EXPANDED", 4)
    sha256 = index.add("data", "data-1.0.tar.gz", b"hello")
    with pytest.raises(FileError, match="sends more than such a file can have"):
        fetch("data", "1.0", sha256, cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sha256 = index.add("data", "data-1.0.tar.gz", b"hello")
    with pytest.raises(FileError, match="point QKV_CACHE elsewhere"):
        fetch("data", "1.0", sha256, cache=tmp_path / "file")


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


def test_write_whole_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_whole(path, [b"old"])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, [b"new"])
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"old"


def test_what_is_written_whole_is_as_private_as_the_user_asks(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_whole(tmp_path / "a", [b"mine"])
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


def test_where_nothing_is_configured_it_is_the_index_of_pip(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    address = fetching._default_index()
    assert address.startswith("https://")
    assert address.endswith("/simple")
    monkeypatch.setattr(fetching, "_pip", lambda *_: "")
    with pytest.raises(FileError, match="there is no pip to ask; set PIP_INDEX_URL"):
        fetching._default_index()
