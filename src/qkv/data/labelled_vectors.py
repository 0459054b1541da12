"""Series of vectors, each with a class, classes or a number."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final, final

from qkv.config import config
from qkv.data.labelled import Holds, Labelled, LabelledSourceConfig, class_folders, hidden_folders
from qkv.data.sources import open_vectors, records, series_of, text_in, value_in
from qkv.errors import FileError
from qkv.yaml_files import expand_home

SERIES_SUFFIXES: Final = (".csv", ".npy")
"""What is read of a folder, in any case."""


@final
@config
class LabelledVectorsConfig(LabelledSourceConfig):
    """The user's own series of vectors, each in a .npy or .csv file: in folders of classes, or named in a table.

    A .npy file holds one series (T, features), or N of them (N, T, features); a .csv file a vector in each row.

    Attributes:
        path: A folder with a folder for each class. Or a table, a .csv, .jsonl or .json file that names a file, whose
            path begins at the table's folder, and what its series have, in each row, line or item.
        field: The table's column or key of the file.
        label: That of the class, the number, or the list of classes.
    """

    holds: ClassVar[Holds] = "vectors"

    path: str
    field: str = "file"
    label: str = "label"

    def items(self) -> Iterator[Labelled]:
        first: tuple[Path, int] | None = None
        for file, label, where in self._files():
            for series in series_of(open_vectors(file), file):
                first = first or (file, series.shape[1])
                if series.shape[1] != first[1]:
                    raise FileError(
                        f"{file}: {series.shape[1]} features, but {first[0]} has {first[1]}; give all the same width"
                    )
                yield Labelled(series.copy(), label, where)  # many files would be many mappings

    def _files(self) -> Iterator[tuple[Path, object, str]]:
        """Each file, what is said of it, and where."""
        place = expand_home(self.path)
        if not place.is_file():
            for file, label in class_folders(self.path, SERIES_SUFFIXES):
                yield file, label, f"{file}: its folder"
            return
        if (found := records(place)) is None:
            raise FileError(f"{place}: is no table; give a .csv, .jsonl or .json file that names files, or a folder")
        for record, where in found:
            file = place.parent / expand_home(text_in(record, self.field, where))
            yield file, value_in(record, self.label, where, "label"), f"{where}: {self.label!r}"

    def notes(self) -> Iterator[str]:
        return hidden_folders(self.path)
