"""Files and folders that are written whole or not at all, whatever happens meanwhile."""

import os
import secrets
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qkv.errors import FileError


@contextmanager
def writing(place: object, remedy: str = "free some space or choose another place") -> Generator[None, None, None]:
    """Turns the `OSError`s of a writer into `FileError`s that name the place and say what to do."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{place}: cannot be written ({error.strerror or error}); {remedy}") from None


def write_whole(path: Path, pieces: Iterable[Any]) -> None:
    """Write a file whole or not at all; it is on the disk (fsync) on return. One of that name is replaced.

    Raises:
        OSError: The disk is full or not writable.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("xb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def whole_folder(folder: Path) -> Generator[Path, None, None]:
    """A folder to fill with `write_whole`, which then takes the name `folder`; what had it before goes.

    Raises:
        OSError: The disk is full or not writable.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        whole = Path(place, "whole")
        whole.mkdir()
        yield whole
        sync_folder(whole)
        with suppress(FileNotFoundError):
            folder.replace(Path(place, "before"))
        whole.replace(folder)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "nt":  # where a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
