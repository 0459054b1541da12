"""Texts as words, each of which has a class: names of people in a sentence, parts of speech."""

from collections.abc import Iterator
from typing import Any, ClassVar, final

from qkv.config import config
from qkv.data.labelled import Holds, Labelled, LabelledSourceConfig
from qkv.data.sources import decode_text, files_below, read_bytes, records, value_in
from qkv.errors import FileError


@final
@config
class LabelledWordsConfig(LabelledSourceConfig):
    """The user's own: .jsonl or .json files with a list of words and one of their classes in each line or item.

    Any other file has a word in each line, with its class in the last column, and a blank line behind each text (the
    form of CoNLL-2003; its lines of -DOCSTART- are left out).

    Attributes:
        path: A file, a folder (of which .conll, .json and .jsonl files are read), a pattern, or several of these.
        field: The key of the words.
        label: That of their classes.
    """

    holds: ClassVar[Holds] = "words"

    path: str | tuple[str, ...]
    field: str = "tokens"
    label: str = "labels"

    def items(self) -> Iterator[Labelled]:
        for path in files_below(self.path, (".conll", ".json", ".jsonl")):
            if (found := records(path)) is None:
                yield from _in_columns(decode_text(read_bytes(path), str(path)), str(path))
                continue
            for record, where in found:
                words, labels = (
                    _several(value_in(record, key, where, setting), f"{where}: {key!r}")
                    for key, setting in ((self.field, "field"), (self.label, "label"))
                )
                if not words or len(words) != len(labels) or not all(isinstance(w, str) and w.strip() for w in words):
                    raise FileError(f"{where}: {len(words)} words and {len(labels)} labels; give each word, which is a "
                                    "text, its own")  # fmt: skip
                yield Labelled(tuple(words), tuple(labels), f"{where}: {self.label!r}")


def _several(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise FileError(f"{where} is {value!r:.60} and must be a list, an entry for each word")
    return value


def _in_columns(text: str, path: str) -> Iterator[Labelled]:
    """The texts of a file with a word in each line."""
    words, first = list[tuple[str, str]](), 1
    for number, line in enumerate([*text.split("\n"), ""], 1):
        columns = line.split()
        if not columns and words:
            said, labels = zip(*words, strict=True)
            yield Labelled(said, labels, f"{path}, from line {first}: a class")
            words = []
        if not columns or columns[0] == "-DOCSTART-":
            continue
        if len(columns) < 2:
            raise FileError(f"{path}, line {number}: {line!r:.60} has no class behind its word; write both in a line")
        first = first if words else number
        words.append((columns[0], columns[-1]))
