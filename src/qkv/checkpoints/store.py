"""A store of training checkpoints, each of which is whole or not there.

A checkpoint is the folder `step-00000123`: safetensors files, `state.json`, and `manifest.json`, which lists the size
and SHA-256 of every other file. It is written under another name, forced to the disk, and renamed when it is complete;
older ones go only after that. So a crash at any moment leaves the checkpoint before or the new one, each of them whole.
"""

import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, final

from qkv.checkpoints.files import file_size, is_plain_name, parse_json, quote, read_json, reading
from qkv.checkpoints.formats import FORMAT, from_format
from qkv.checkpoints.tensors import encode_tensors, read_tensors
from qkv.disk import sync_folder
from qkv.errors import ConfigError, FileError, suggest
from qkv.shapes import Tensor

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

# The moments of a save at which a crash or a full disk is tried by the tests, in order.
POINTS = (
    "folder made", "file opened", "piece written", "file written", "file synced", "folder synced",
    "same step set aside", "renamed", "rename synced", "older one removed",
)  # fmt: skip

_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,18})(\.old)?", re.ASCII)
_PIECE = 8 << 20  # bytes hashed and written at a time


@final
@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: every file has the size and the hash that its manifest lists."""

    path: Path
    step: int
    files: tuple[str, ...]
    """What `tensors` takes."""
    state: dict[str, Any]
    format: int = FORMAT
    """Of the tensors on the disk."""
    warnings: tuple[str, ...] = ()
    """One line for each newer checkpoint that was passed over, and for each file that does not belong here."""

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Verify one checkpoint folder: sizes first, then hashes.

        Raises:
            FileError: It is not a checkpoint, or one of its files is missing or damaged.
        """
        number, step, listed = _read_manifest(path)
        for name, claimed in listed.items():
            if (found := file_size(path / name)) != (size := claimed["bytes"]):
                raise FileError(f"{path / name}: {found} bytes, the manifest says {size}; use another checkpoint")
        for name, claimed in listed.items():
            if _sha256(path / name) != claimed["sha256"]:
                raise FileError(f"{path / name}: its SHA-256 is not the manifest's; use another checkpoint")
        state = read_json(path / "state.json")
        strangers = sorted(p.name for p in path.iterdir() if p.name not in listed and p.name != _MANIFEST)
        warnings = tuple(f"{path}: ignoring {name!a}, which its manifest does not list" for name in strangers)
        files = tuple(name.removesuffix(".safetensors") for name in listed if name.endswith(".safetensors"))
        return cls(path, step, files, state, number, warnings)

    def tensors(self, file: str) -> dict[str, Tensor]:
        """The tensors of one file, memory-mapped. They stay readable when the store prunes this checkpoint.

        Those that another format held otherwise are copies, as this version has them.

        Raises:
            FileError: No such file in this checkpoint.
        """
        if file not in self.files:
            raise FileError(f"{self.path}: has no tensors {file!r}; {suggest(file, self.files)}")
        return from_format(self.format, read_tensors(self.path / f"{file}.safetensors"))


@final
class Store:
    """The checkpoints of one run, in one folder, written by one process at a time.

    Args:
        folder: Made at the first save.
        keep: How many to keep, the newest. (For the best by some measure, use a second store with `keep=1`.)
        at: Called with each of `POINTS` while saving. For tests.

    Raises:
        ConfigError: `keep` is less than 1.
    """

    def __init__(self, folder: Path, keep: int = 2, at: Callable[[str], None] = lambda _: None):
        if keep < 1:
            raise ConfigError(f"keep={keep} would remove the checkpoint just saved; use 1 or more")
        self.folder = folder
        self.keep = keep
        self._at = at

    def save(self, step: int, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, JSON]) -> Path:
        """Write a checkpoint; on return it is on the disk. One of the same step is replaced.

        Afterwards the checkpoints of earlier steps beyond the newest `keep` are removed. One of a later step never is.

        Args:
            step: Orders the checkpoints.
            files: Tensors by file name (without an ending) and by name.
            state: Everything else: plain JSON data.

        Raises:
            ConfigError: A negative step, a file name that is a path, or a state too large to be read back.
            FileError: The disk is full or not writable. The checkpoints before are as they were.
        """
        final_path = self.folder / _folder_name(step)
        for name in files:
            if not is_plain_name(name):
                raise ConfigError(f"{name!r} cannot name a file of a checkpoint; use letters, digits, _ and -")
        text = json.dumps(state).encode()
        try:
            parse_json(text)
        except ValueError as error:
            raise ConfigError(f"the state to save: {error}; put what is large into tensors") from None
        partial = _temporary(final_path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("step-*.tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            self._write_all(partial, step, files, text)
            self._put_in_place(partial, final_path)
        except OSError as error:
            reason = f"not saved ({error.strerror}); the ones before are intact"
            raise FileError(f"{final_path}: {reason}; free some space or choose another folder") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._prune(step)
        return final_path

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, verified, or None if nothing was ever saved here.

        Raises:
            FileError: There are checkpoints, but none is whole.
        """
        warnings: list[str] = []
        for path in self._newest_first():
            try:
                checkpoint = Checkpoint.open(path)
            except FileError as error:
                warnings.append(str(error))
            else:
                return dataclasses.replace(checkpoint, warnings=(*warnings, *checkpoint.warnings))
        if warnings:
            raise FileError(f"{self.folder}: none of its {len(warnings)} checkpoints is whole ({warnings[0]})")
        return None

    def _write_all(self, partial: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], state: bytes) -> None:
        partial.mkdir()
        self._at("folder made")
        listed = {
            f"{name}.safetensors": self._write(partial / f"{name}.safetensors", encode_tensors(tensors))
            for name, tensors in files.items()
        }
        listed["state.json"] = self._write(partial / "state.json", [state])
        manifest = {"format": FORMAT, "step": step, "files": listed}
        self._write(partial / _MANIFEST, [json.dumps(manifest, indent=1).encode()])
        sync_folder(partial)
        self._at("folder synced")

    def _write(self, path: Path, buffers: Iterable[Any]) -> dict[str, int | str]:
        """Write one file to the disk, hashed on the way. Returns its entry in the manifest."""
        digest = hashlib.sha256()
        with path.open("xb") as file:
            self._at("file opened")
            for buffer in buffers:
                for start in range(0, len(buffer), _PIECE):
                    piece = buffer[start : start + _PIECE]
                    file.write(piece)
                    digest.update(piece)
                    self._at("piece written")
            file.flush()
            self._at("file written")
            os.fsync(file.fileno())
            self._at("file synced")
            return {"bytes": file.tell(), "sha256": digest.hexdigest()}

    def _put_in_place(self, partial: Path, final_path: Path) -> None:
        if final_path.exists():
            # Not removed yet: between the two renames this is the only whole one. `latest` finds it under `.old`, too.
            old = final_path.with_name(final_path.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            final_path.rename(old)
            self._at("same step set aside")
        partial.rename(final_path)
        self._at("renamed")
        sync_folder(self.folder)
        sync_folder(self.folder.parent)  # the first save may have made the folder
        self._at("rename synced")

    def _prune(self, step: int) -> None:
        old = [path for path in self._newest_first() if _order(path) == (step, False)]
        earlier = [path for path in self._newest_first() if _order(path)[0] < step]
        try:
            for path in old + earlier[self.keep - 1 :]:
                # Renamed first: what is half removed must not look like a damaged checkpoint.
                shutil.rmtree(path.rename(_temporary(path)))
                self._at("older one removed")
        except OSError as error:
            reason = f"step {step} is saved, but older ones could not be removed ({error.strerror})"
            raise FileError(f"{self.folder}: {reason}; check its permissions") from None

    def _newest_first(self) -> list[Path]:
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_order, reverse=True)


def _folder_name(step: int) -> str:
    if step < 0:
        raise ConfigError(f"step={step}: a checkpoint's step counts from 0; use 0 or more")
    return f"step-{step:08d}"


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")


def _order(path: Path) -> tuple[int, bool]:
    """Sorts by step; of two with the same step the one set aside comes first."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), match[2] is None


def _read_manifest(folder: Path) -> tuple[int, int, dict[str, Any]]:
    """Format, step, and what is claimed of each file: bytes and sha256."""
    path = folder / _MANIFEST
    match read_json(path):
        case {
            "format": int(number), "step": int(step), "files": {"state.json": _, **_others} as files
        } if 1 <= number <= FORMAT:  # fmt: skip
            pass
        case _:
            raise FileError(f"{path}: not a manifest of format 1 to {FORMAT}; use another checkpoint or a newer qkv")
    if (named := _NAME.fullmatch(folder.name)) and int(named[1]) != step:
        raise FileError(f"{path}: is of step {step}, but in the folder {folder.name}; use another checkpoint")
    for name, entry in files.items():
        match entry:
            case {"bytes": int(), "sha256": str()} if is_plain_name(name):
                continue
        reason = f"entry {quote(name)} is not a plain file name with size and SHA-256"
        raise FileError(f"{path}: {reason}; use another checkpoint")
    return number, step, files


def _sha256(path: Path) -> str:
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
