"""Pictures with texts that say what they show: sources, and batches without padding."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch

from qkv.config import Config, config
from qkv.data.augment import PictureAugmentationConfig
from qkv.data.batches import Batch, Batches
from qkv.data.pictures import PICTURE_SUFFIXES, Channels, Size, read_picture
from qkv.data.reads import Read, without_padding
from qkv.data.sources import decode_text, files_below, read_bytes, records, text_in
from qkv.errors import FileError
from qkv.models.two_towers import Captioned
from qkv.yaml_files import expand_home


class Described(NamedTuple):
    """A picture (channels, height, width) in uint8, and texts of it, of which the first says best what it shows."""

    picture: np.ndarray
    texts: tuple[str, ...]


@config
class DescribedSourceConfig(Config, ABC):
    """A corpus of pictures with texts in a fixed order, the same every time it is read."""

    @abstractmethod
    def items(self) -> Iterator[Described]:
        """Each picture with its texts, of which there is at least one.

        Raises:
            FileError: Something is missing, unreadable or not what it should be.
        """


@final
@config
class DescribedFilesConfig(DescribedSourceConfig):
    """The user's own: a table of pictures and texts, or a folder of pictures, each with a .txt of its name beside it.

    Attributes:
        path: A .csv, .jsonl or .json file with a picture and a text in each row, line or item, where several of one
            picture are its texts; or a folder, in whose .txt files each line is a text.
        picture: The column or key of the picture's path, which counts from the folder of the table.
        text: That of the text.
        channels: 1 (grey) or 3 (red, green, blue).
        size: Height and width that each picture is resized to; None: they stay as they are, and must be whole patches.
    """

    path: str
    picture: str = "picture"
    text: str = "text"
    channels: Channels = 3
    size: Size | None = None

    def items(self) -> Iterator[Described]:
        path = expand_home(self.path)
        for picture, texts in (self._of_folder(path) if path.is_dir() else self._of_table(path)).items():
            yield Described(read_picture(picture, channels=self.channels, size=self.size), tuple(texts))

    def _of_table(self, path: Path) -> dict[Path, list[str]]:
        if (found := records(path)) is None:
            raise FileError(f"{path}: is no table; give a .csv, .jsonl or .json file, or a folder of pictures")
        texts: dict[Path, list[str]] = {}
        for record, where in found:
            picture = text_in(record, self.picture, where, "picture")
            texts.setdefault(path.parent / picture, []).append(_text(text_in(record, self.text, where, "text"), where))
        return texts

    def _of_folder(self, folder: Path) -> dict[Path, list[str]]:
        texts: dict[Path, list[str]] = {}
        for picture in files_below(str(folder), PICTURE_SUFFIXES):
            if not (beside := picture.with_suffix(".txt")).is_file():
                raise FileError(f"{picture}: has no {beside.name} beside it; write one that says what it shows")
            lines = decode_text(read_bytes(beside), str(beside)).splitlines()
            texts[picture] = [line.strip() for line in lines if line.strip()] or [_text("", str(beside))]
        return texts


def _text(text: str, where: str) -> str:
    if not text.strip():
        raise FileError(f"{where}: the text is empty; fill it in, or leave the picture out")
    return text.strip()


# --- batches ----------------------------------------------------------------------------------------------------------


@final
class DescribedBatches(Batches):
    """The batches of pictures with texts: nothing is padded on either side (see `without_padding`).

    In training one text of a picture is drawn each time: the first as often as all others together. Else it is the
    first. Targets are (items, 2): the numbers of the first text, which says what is shown, and of the text.

    Args:
        items: The pictures as numbers, and the ids of their texts.
        read_picture: What a model reads of a picture.
        read_text: What a model reads of a text.
        augment: What varies a picture in training, with a generator of its own for each epoch.
        context: Tokens of the longest text.
        batch_size: Pictures of a batch.
        seed, shuffle: See `Batches`.
    """

    def __init__(
        self,
        items: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]],
        read_picture: Callable[[np.ndarray], Read],
        read_text: Callable[[np.ndarray], Read],
        augment: Sequence[PictureAugmentationConfig],
        *,
        context: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        super().__init__(context=context, batch_size=batch_size, seed=seed, shuffle=shuffle)
        self._items, self._read_picture, self._read_text, self._augment = items, read_picture, read_text, augment
        numbers: dict[bytes, int] = {}
        self._numbers = [[numbers.setdefault(x.tobytes(), len(numbers)) for x in texts] for _, texts in items]

    @property
    def n_rows(self) -> int:
        """Number of pictures."""
        return len(self._items)

    def rows(self, epoch: int, first: int, end: int) -> Batch:
        order = np.arange(self.n_rows)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n_rows)
        drawn = [self._drawn(i, epoch) for i in order[first:end].tolist()]
        texts, tokens = without_padding([self._read_text(text) for _, text, _ in drawn])
        patches, places = without_padding([self._read_picture(picture) for picture, _, _ in drawn])
        targets = torch.tensor([target for _, _, target in drawn])
        return Batch(Captioned(texts, tokens, patches), targets, places)

    def _drawn(self, i: int, epoch: int) -> tuple[np.ndarray, np.ndarray, Any]:
        """The picture, one of its texts, and the numbers of what it shows and of the text."""
        (picture, texts), numbers, n = self._items[i], self._numbers[i], 0
        if self.shuffle:
            generator = np.random.default_rng([self.seed, epoch, i])
            n = int(generator.integers(1, len(texts))) if len(texts) > 1 and generator.random() < 0.5 else 0
            for each in self._augment:
                picture = each.vary(picture, generator)
        return picture, texts[n], (numbers[0], numbers[n])
