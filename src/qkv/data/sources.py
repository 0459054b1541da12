"""Where a corpus comes from: the user's own files, or a data package."""

import csv
import gzip
import io
import json
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields
from glob import glob
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, TypeVar, cast, final

import numpy as np

from qkv.config import Config, config
from qkv.errors import ConfigError, FileError
from qkv.fetch import check_package, fetch, read_archive
from qkv.yaml_files import expand_home

Holds = Literal["text", "conversations", "vectors"]

TEXT_SUFFIXES: Final = (".jsonl", ".md", ".txt")
"""What is read of a folder, in any case and with `.gz` behind. A single file may have any other suffix."""

_TABLES: Final = (".parquet", ".arrow", ".feather", ".xlsx", ".xls")
_MAGIC: Final = {
    b"PAR1": "Parquet", b"PK\3\4": "ZIP", b"%PDF": "PDF", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"
}  # fmt: skip


@config
class SourceConfig(Config, ABC):
    """A corpus: documents in a fixed order, the same every time they are read."""

    holds: ClassVar[Holds] = "text"
    """What the documents are, and with it what a model learns of them."""

    @abstractmethod
    def documents(self) -> Iterator[Any]:
        """The documents (text, vectors or conversations), one after the other, read as they are asked for."""

    def notes(self) -> Iterable[str]:
        """What to say about the corpus before it is read; here nothing."""
        return ()


C = TypeVar("C", bound=Config)


def in_files(source: C, path: str | tuple[str, ...]) -> C:
    """The same kind of corpus in other files, those of `validation`; `ConfigError` where it is not in files."""
    if "path" not in {field.name for field in fields(cast("Any", source))}:
        raise ConfigError(f"validation={path}: the source {source.tag()} is not in files; give a share such as 0.05")
    return source.replace(path=path)


@config
class TextSourceConfig(SourceConfig):
    """A corpus of texts.

    Text is strict UTF-8. Line ends become a single newline and a byte order mark is dropped; nothing else changes.
    """

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The documents that hold any text.

        Raises:
            FileError: Something is missing, unreadable or not text.
        """


@final
@config
class FilesConfig(TextSourceConfig):
    """The user's own text: files, and all .jsonl, .md and .txt files below folders, sorted by path; also packed as .gz.

    A file is one document; a .jsonl, .csv or .json file has one in each line, row or item. Hidden files are left out.

    Attributes:
        path: A file, a folder, a pattern (`texts/*.txt`), or several of these.
        field: The key or column of the text in a .jsonl, .csv or .json file.
    """

    path: str | tuple[str, ...]
    field: str = "text"

    def documents(self) -> Iterator[str]:
        for path in files_below(self.path, TEXT_SUFFIXES):
            if (found := records(path)) is None:
                texts = [decode_text(read_bytes(path), str(path))]
            else:
                texts = (text_in(record, self.field, where) for record, where in found)
            yield from filter(None, texts)

    def notes(self) -> Iterator[str]:
        places = [expand_home(path) for path in _several(self.path)]
        for folder in filter(Path.is_dir, places):
            read = set(files_below(str(folder), TEXT_SUFFIXES))
            files = [file for file in folder.rglob("*") if file.is_file()]
            others = Counter(file.suffix or file.name for file in files if file not in read)
            left = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(5))
            yield f"{folder}: {len(read)} files to read" + (f"; left out: {left}" if left else "")


@final
@config
class PackageConfig(TextSourceConfig):
    """Texts in a PyPI package, one document per file.

    Attributes:
        name: The package.
        version: Its exact version.
        sha256: Of the archive, source archive or wheel.
        files: Which files of the archive; wildcards for a file's name or its whole path, in which `*` also matches `/`.
    """

    name: str
    version: str
    sha256: str
    files: str

    def __post_init__(self) -> None:
        check_package(self.name, self.version, self.sha256)

    def documents(self) -> Iterator[str]:
        archive = fetch(self.name, self.version, self.sha256)
        members = read_archive(archive, self.files)
        if not members:
            raise FileError(f"{archive.name}: no file matches {self.files!r}; correct `files`")
        yield from filter(None, (decode_text(data, f"{archive.name}: {name}") for name, data in members))


SHAKESPEARE: Final = PackageConfig(
    name="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    files="*/shksprdata/texts/*_gut.txt",
)
"""The plays and poems of Shakespeare in modern spelling: 42 documents, 5.0 million characters, public domain.

The package has already removed Project Gutenberg's headers and licence. It also holds Milton and the spelling of the
First Folio, which `files` leaves out.
"""


@final
@config
class VectorFilesConfig(SourceConfig):
    """The user's own sequences of real vectors: a .npy file, or all .npy files below a folder, sorted by path.

    A file holds one sequence (T, features) or N of them (N, T, features), in any floating type; it is read as float32.

    Attributes:
        path: The file or folder.
    """

    holds: ClassVar[Holds] = "vectors"

    path: str

    def documents(self) -> Iterator[np.ndarray]:
        """The sequences, each (T, features) in float32.

        Raises:
            FileError: A file is missing, not such an array, of another width than the first, or has a value that is not
                finite in float32.
        """
        first: tuple[Path, int] | None = None
        for path in files_below(self.path, (".npy",)):
            array = open_vectors(path)
            first = first or (path, array.shape[-1])
            if array.shape[-1] != first[1]:
                raise FileError(
                    f"{path}: {array.shape[-1]} features, but {first[0].name} has {first[1]}; give all the same width"
                )
            yield from series_of(array, path)


def files_below(path: str | tuple[str, ...], suffixes: tuple[str, ...]) -> list[Path]:
    """The files that are named or match a pattern, and those with one of the suffixes below folders; sorted for each.

    Raises:
        FileError: There is none.
    """
    if not isinstance(path, str):
        return list(dict.fromkeys(file for one in path for file in files_below(one, suffixes)))
    place = expand_home(path)
    if place.is_file():
        return [place]
    if not place.is_dir():
        matches = map(Path, glob(str(place), recursive=True))  # noqa: PTH207 - of any root
        found = sorted(file for file in matches if file.is_file())
        if not found:
            raise FileError(f"{place}: no such file or folder; give the path of your data")
        return found
    found = sorted(
        file
        for file in place.rglob("*")
        if _suffix(file) in suffixes and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(place).parts)
    )  # fmt: skip
    if not found:
        raise FileError(f"{place}: the folder has no {', '.join(suffixes)} file; give a folder that has, or one file")
    return found


def _several(path: str | tuple[str, ...]) -> tuple[str, ...]:
    return (path,) if isinstance(path, str) else path


def _suffix(path: Path) -> str:
    """What the file is, in lower case, packed or not."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open(path: Path) -> Any:
    """The file, unpacked if it is packed with gzip."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.GzipFile(path) if packed else path.open("rb")


def _unreadable(path: Path, error: Exception) -> FileError:
    if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
        return FileError(f"{path}: ends too early or is damaged, as what gzip packed; get it, or pack it, again")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return FileError(f"{path}: cannot be read ({reason}); check its permissions")


def read_bytes(path: Path) -> bytes:
    """All of a file, unpacked if it is packed with gzip."""
    try:
        with _open(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def decode_text(data: bytes, where: str) -> str:
    """Strict UTF-8 with plain line ends; `where` is what errors call it."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if kind := next((kind for magic, kind in _MAGIC.items() if data.startswith(magic)), None):
            raise FileError(f"{where}: is a {kind} file, not text; write its text to a .txt or .jsonl file") from None
        raise FileError(f"{where}: byte {error.start} is not UTF-8 text; convert the file to UTF-8") from None
    if (place := data.find(b"\0")) >= 0:
        raise FileError(f"{where}: a zero at byte {place}, so this is not a text file; give text")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def json_records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects in a file of JSON Lines, each with the name of its line for errors.

    Raises:
        FileError: The file cannot be read, or a line is not a JSON object of text without halves of characters.
    """
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                try:
                    record: Any = json.loads(decode_text(line, where))
                except (ValueError, RecursionError) as error:
                    raise FileError(f"{where}: not valid JSON ({error}); write one object per line") from None
                if not isinstance(record, dict):
                    found = type(record).__name__
                    raise FileError(f"{where}: needs an object, found {found}; write one object per line")
                yield record, where
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def records(path: Path) -> Iterator[tuple[dict[str, Any], str]] | None:
    """The objects of a file that holds several, with their places; None: it is one text."""
    kind = _suffix(path)
    if kind in _TABLES:
        raise FileError(
            f"{path}: tables in {kind} are not read; write JSON Lines, for example with pandas: "
            'read_parquet(…).to_json(…, orient="records", lines=True)'
        )
    if kind in (".jsonl", ".ndjson"):
        return json_records(path)
    if kind not in (".json", ".csv"):
        return None
    text = decode_text(read_bytes(path), str(path))
    try:
        rows: Any = json.loads(text) if kind == ".json" else _csv_rows(text, path)
    except (ValueError, RecursionError, csv.Error) as error:
        raise FileError(f"{path}: not valid {kind[1:].upper()} ({error}); correct it, or rename it to .txt") from None
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise FileError(f"{path}: needs a list of objects with texts; write one, or rename it to .txt")
    return ((row, f"{path}, {'item' if kind == '.json' else 'row'} {n}") for n, row in enumerate(rows, start=1))


def _csv_rows(text: str, path: Path) -> list[dict[str, Any]]:
    """The rows by the names in the first; `FileError` where two columns have one name."""
    reader = csv.DictReader(io.StringIO(text), restkey="", strict=True)
    first = list(reader.fieldnames or ())
    if len(first) == 1 and (other := next((mark for mark in ";\t|" if mark in first[0]), None)):
        raise FileError(f"{path}: its columns stand between {other!r}; write it with commas")
    names = Counter(first)
    if twice := [name for name, n in names.items() if n > 1]:
        raise FileError(f"{path}: {names[twice[0]]} columns are called {twice[0]!r}; give each a name of its own")
    return list(reader)


def value_in(record: dict[str, Any], field: str, where: str, setting: str = "field") -> Any:
    """What stands under a key, which a `setting` of a config names; `FileError` where there is no such key."""
    if field not in record:
        names = ", ".join(sorted(record)[:10])
        if "messages" in record or {"prompt", "response"} <= record.keys():
            remedy = "it is a conversation: take the source Conversations, or eval --conversations"
        else:
            remedy = f"set `{setting}`" + " (eval: --field)" * (setting == "field")
        raise FileError(f"{where}: needs an object with the key {field!r}, found {names or 'nothing'}; {remedy}")
    return record[field]


def text_in(record: dict[str, Any], field: str, where: str, setting: str = "field") -> str:
    """As `value_in`; `FileError` where it is no text."""
    value = value_in(record, field, where, setting)
    if not isinstance(value, str):
        raise FileError(f"{where}: {field!r} must be a string, found {type(value).__name__}")
    try:
        return decode_text(value.encode("utf-8"), where)
    except UnicodeEncodeError:
        raise FileError(f"{where}: {field!r} has half a surrogate pair, which is no character; remove it") from None


def open_vectors(path: Path) -> np.ndarray:
    """The array of a .npy file, (T, features) or (N, T, features), or of a .csv file with a vector in each row.

    Raises:
        FileError: It is none of floats.
    """
    if _suffix(path) == ".csv":
        return _csv_vectors(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises almost anything on crafted files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "object" in reason.lower():
            reason = "Python objects, no floats; sequences of several lengths need a file each"
        raise FileError(f"{path}: not a readable .npy array ({reason}); write it with numpy.save") from None
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or array.dtype.kind != "f" or not array.size:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise FileError(f"{path}: needs floats (T, features) or (N, T, features), found {found}")
    return array


def series_of(array: np.ndarray, path: Path) -> Iterator[np.ndarray]:
    """The sequences of an array, each (T, features) in float32; `FileError` where a value is not finite in that."""
    for i, sequence in enumerate(array if array.ndim == 3 else array[None]):
        yield _finite(sequence, path, i)


def _csv_vectors(path: Path) -> np.ndarray:
    """Numbers in rows, (T, features); a first row without any number is their names."""
    try:
        rows = [row for row in csv.reader(io.StringIO(decode_text(read_bytes(path), str(path))), strict=True) if row]
    except csv.Error as error:
        raise FileError(f"{path}: not valid CSV ({error}); correct it") from None
    first = 1 if rows and not any(map(_is_number, rows[0])) else 0
    if len(rows) == first:
        raise FileError(f"{path}: has no row of numbers; write a vector in each row")
    width = len(rows[first])
    for number, row in enumerate(rows[first:], first + 1):
        if len(row) != width or not all(map(_is_number, row)):
            found = next((cell for cell in row if not _is_number(cell)), None)
            reason = f"has {len(row)} values and the first {width}" if found is None else f"{found!r:.40} is no number"
            raise FileError(f"{path}, row {number}: {reason}; write a vector of numbers in each row, between commas")
    return np.array(rows[first:], dtype=np.float64)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _finite(sequence: np.ndarray, path: Path, number: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        sequence = np.asarray(sequence, dtype=np.float32)
    bad = np.argwhere(~np.isfinite(sequence))
    if len(bad):
        raise FileError(
            f"{path}: sequence {number} has a value that is not finite in float32 at (step, feature) "
            f"({bad[0][0]}, {bad[0][1]}); remove or replace it; "
            "sequences of several lengths need no padding, but a file each"
        )
    return sequence
