"""Augmentation: what varies pictures in training, so that a model learns what does not matter."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Final, NamedTuple, final

import numpy as np

from qkv.config import Config, Count, Positive, config, must
from qkv.errors import ConfigError

Chance = Annotated[float, must("be above 0 and at most 1", lambda p: 0 < p <= 1)]
Span = tuple[Positive, Positive]


class Examples(NamedTuple):
    """The pictures of a batch, each (C, H, W) in uint8, and the target of each, a row (N, …) of numbers."""

    pictures: list[np.ndarray]
    targets: np.ndarray


@config
class AugmentationConfig(Config, ABC):
    """Base of what makes other pictures of those of a batch."""

    mixes: ClassVar[bool] = False
    """Whether it mixes targets, so that each class needs a number of its own in them: its share."""

    @abstractmethod
    def apply(self, examples: Examples, generators: Sequence[np.random.Generator]) -> Examples:
        """Others of the same sizes; each picture has a generator, the same for the same seed, epoch and item."""


@config
class PictureAugmentationConfig(AugmentationConfig):
    """Base of what varies each picture by itself; its class stays."""

    @final
    def apply(self, examples: Examples, generators: Sequence[np.random.Generator]) -> Examples:
        pairs = zip(examples.pictures, generators, strict=True)
        return examples._replace(pictures=[self.vary(picture, generator) for picture, generator in pairs])

    @abstractmethod
    def vary(self, picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Another picture of the same class, (C, H, W) in uint8, of the same size."""


@final
@config
class ShiftConfig(PictureAugmentationConfig):
    """Moves a picture by up to `pixels` up or down and to a side; what comes into sight is black.

    Attributes:
        pixels: At most, in each direction.
    """

    pixels: Count

    def vary(self, picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        n, (c, h, w) = self.pixels, picture.shape
        y, x = generator.integers(0, 2 * n + 1, size=2).tolist()
        framed = np.zeros((c, h + 2 * n, w + 2 * n), picture.dtype)  # several times as fast as np.pad
        framed[:, n : n + h, n : n + w] = picture
        return framed[:, y : y + h, x : x + w]


@final
@config
class HorizontalFlipConfig(PictureAugmentationConfig):
    """Turns left to right.

    Attributes:
        chance: How often.
    """

    chance: Chance = 0.5

    def vary(self, picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return picture[:, :, ::-1] if generator.random() < self.chance else picture


@final
@config
class RandomResizedCropConfig(PictureAugmentationConfig):
    """A part of the picture, resized to the whole (bicubic): GoogLeNet's (Szegedy et al. 2015, section 6).

    How the part is drawn is torchvision's: ten times it is tried to place one, and if none fits, the middle is taken.

    Attributes:
        scale: Least and largest share of the area.
        ratio: Least and largest width of the part for each unit of its height.

    Raises:
        ConfigError: The first of two numbers is the larger one, or a part is larger than the whole.
    """

    scale: Span = (0.08, 1.0)
    ratio: Span = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        _check_span("scale", self.scale, most=1)
        _check_span("ratio", self.ratio)

    def vary(self, picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        from PIL import Image

        _, h, w = picture.shape
        y, x, part_h, part_w = self._part(h, w, generator)
        box = (x, y, x + part_w, y + part_h)
        return _as_image(picture, lambda image: image.resize((w, h), Image.Resampling.BICUBIC, box))

    def _part(self, h: int, w: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        """Its upper row, its left column, its height and its width."""
        if (box := _random_box(h, w, self.scale, self.ratio, generator)) is not None:
            return box
        low, high = self.ratio
        part_w = min(w, round(h * high)) if w / h > high else w
        part_h = min(h, round(w / low)) if w / h < low else h
        return (h - part_h) // 2, (w - part_w) // 2, part_h, part_w


@final
@config
class RandomErasingConfig(PictureAugmentationConfig):
    """Puts noise in the place of a part of the picture (Zhong et al. 2020, algorithm 1).

    Attributes:
        chance: How often.
        scale: Least and largest share of the area.
        ratio: Least and largest width of the part for each unit of its height.

    Raises:
        ConfigError: As for `RandomResizedCrop`.
    """

    chance: Chance = 0.25
    scale: Span = (0.02, 1 / 3)
    ratio: Span = (0.3, 3.3)

    def __post_init__(self) -> None:
        _check_span("scale", self.scale, most=1)
        _check_span("ratio", self.ratio)

    def vary(self, picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        c, h, w = picture.shape
        if generator.random() >= self.chance:
            return picture
        if (box := _random_box(h, w, self.scale, self.ratio, generator)) is None:
            return picture
        y, x, part_h, part_w = box
        varied = picture.copy()
        varied[:, y : y + part_h, x : x + part_w] = generator.integers(0, 256, (c, part_h, part_w), np.uint8)
        return varied


@final
@config
class RandomAffineConfig(PictureAugmentationConfig):
    """Turns a picture around its middle and makes it larger or smaller (bilinear); what comes into sight is black.

    Attributes:
        degrees: By how much it is turned at most, either way.
        scale: The least and the largest factor.

    Raises:
        ConfigError: The first factor is the larger one.
    """

    degrees: Positive
    scale: Span = (1.0, 1.0)

    def __post_init__(self) -> None:
        _check_span("scale", self.scale)

    def vary(self, picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        from PIL import Image

        _, h, w = picture.shape
        angle = math.radians(generator.uniform(-self.degrees, self.degrees))
        factor = generator.uniform(*self.scale)
        a, b = math.cos(angle) / factor, math.sin(angle) / factor
        x, y = w / 2, h / 2
        inverse = (a, b, x - a * x - b * y, -b, a, y + b * x - a * y)
        return _as_image(
            picture, lambda image: image.transform((w, h), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
        )


# --- RandAugment ------------------------------------------------------------------------------------------------------

_STEPS: Final = 30


@final
@config
class RandAugmentConfig(PictureAugmentationConfig):
    """`n` of 14 operations, one after the other, each as strong as `magnitude` says (Cubuk et al. 2020, section 3).

    Operations and their largest magnitudes are torchvision's: identity, shearing (0.3), moving (150/331 of the width)
    and turning (30°), brightness, colour, contrast and sharpness (by 0.9), fewer bits (down to 4), solarising (from
    white down to black), automatic contrast and equalising; what has two directions takes one by chance.

    Attributes:
        n: How many operations.
        magnitude: From 0, nothing, to 30, the largest.
    """

    n: Count = 2
    magnitude: Annotated[int, must(f"be from 0 to {_STEPS}", lambda m: 0 <= m <= _STEPS)] = 9

    def vary(self, picture: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        names = [_NAMES[i] for i in generator.integers(0, len(_NAMES), self.n).tolist()]
        signs = generator.choice([-1, 1], self.n).tolist()

        def work(image: Any) -> Any:
            for name, sign in zip(names, signs, strict=True):
                image = _operation(image, name, self.magnitude / _STEPS, sign)
            return image

        return _as_image(picture, work)


_NAMES: Final = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip


def _operation(image: Any, name: str, share: float, sign: int) -> Any:
    """One of them on a `PIL.Image`, at a share of its largest magnitude; the names in capitals are pillow's."""
    from PIL import Image, ImageEnhance, ImageOps

    match name:
        case "identity":
            return image
        case "shear_x" | "shear_y" | "translate_x" | "translate_y":
            moved = int(share * 150 / 331 * (image.width if name.endswith("x") else image.height))
            by = sign * (share * 0.3 if name.startswith("shear") else moved)
            inverse = {
                "shear_x": (1, by, 0, 0, 1, 0),
                "shear_y": (1, 0, 0, by, 1, 0),
                "translate_x": (1, 0, -by, 0, 1, 0),
                "translate_y": (1, 0, 0, 0, 1, -by),
            }[name]
            return image.transform(image.size, Image.Transform.AFFINE, inverse)
        case "rotate":
            return image.rotate(sign * share * 30)
        case "posterize":
            return ImageOps.posterize(image, 8 - round(share * 4))
        case "solarize":
            return ImageOps.solarize(image, math.ceil(255 * (1 - share)))
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case _:
            return getattr(ImageEnhance, name)(image).enhance(1 + sign * share * 0.9)


# --- two pictures -----------------------------------------------------------------------------------------------------


@config
class MixingConfig(AugmentationConfig):
    """Base of what mixes each picture with another of the batch that has its size, if there is one, and their targets.

    The share of the first is drawn from a Beta(alpha, alpha) distribution for each pair.

    Attributes:
        alpha: The larger, the more even are the shares.
        chance: How often a picture is mixed.
    """

    mixes: ClassVar[bool] = True

    alpha: Positive
    chance: Chance = 1.0

    @final
    def apply(self, examples: Examples, generators: Sequence[np.random.Generator]) -> Examples:
        pictures, targets = examples
        mixed, shares = list(pictures), targets.copy()
        for i, j in enumerate(_partners([each.shape for each in pictures], generators[0])):
            if generators[i].random() < self.chance:
                share = generators[i].beta(self.alpha, self.alpha)
                mixed[i], share = self.mix(pictures[i], pictures[j], share, generators[i])
                shares[i] = share * targets[i] + (1 - share) * targets[j]
        return Examples(mixed, shares)

    @abstractmethod
    def mix(
        self, a: np.ndarray, b: np.ndarray, share: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        """A picture of two of one size, about `share` of it the first, and its exact share."""


def _partners(shapes: Sequence[tuple[int, ...]], generator: np.random.Generator) -> list[int]:
    """For each picture another of its shape, and each is that of one; of a single one itself."""
    places: dict[tuple[int, ...], list[int]] = {}
    for i in generator.permutation(len(shapes)).tolist():
        places.setdefault(shapes[i], []).append(i)
    partner = {i: j for same in places.values() for i, j in zip(same, [*same[1:], same[0]], strict=True)}
    return [partner[i] for i in range(len(shapes))]


@final
@config
class MixupConfig(MixingConfig):
    """Both pictures through each other (Zhang et al. 2018, section 2)."""

    alpha: Positive = 0.2

    def mix(
        self, a: np.ndarray, b: np.ndarray, share: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        return np.rint(np.float32(share) * a + np.float32(1 - share) * b).astype(np.uint8), share


@final
@config
class CutMixConfig(MixingConfig):
    """A part of the second in the place of that of the first (Yun et al. 2019, section 3.1)."""

    alpha: Positive = 1.0

    def mix(
        self, a: np.ndarray, b: np.ndarray, share: float, generator: np.random.Generator
    ) -> tuple[np.ndarray, float]:
        _, h, w = a.shape
        half_h, half_w = h * math.sqrt(1 - share) / 2, w * math.sqrt(1 - share) / 2
        y, x = generator.uniform(0, h), generator.uniform(0, w)
        top, bottom = (round(min(max(edge, 0), h)) for edge in (y - half_h, y + half_h))
        left, right = (round(min(max(edge, 0), w)) for edge in (x - half_w, x + half_w))
        mixed = a.copy()
        mixed[:, top:bottom, left:right] = b[:, top:bottom, left:right]
        return mixed, 1 - (bottom - top) * (right - left) / (h * w)


# --- what they share --------------------------------------------------------------------------------------------------


def _as_image(picture: np.ndarray, work: Callable[[Any], Any]) -> np.ndarray:
    """What `work` makes of a picture as a `PIL.Image`."""
    from PIL import Image

    c, h, w = picture.shape
    made = work(Image.fromarray(np.ascontiguousarray(picture[0] if c == 1 else picture.transpose(1, 2, 0))))
    return np.asarray(made).reshape(h, w, c).transpose(2, 0, 1)


def _random_box(
    h: int, w: int, scale: Span, ratio: Span, generator: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Upper row, left column, height and width of a part with a share of the area and a ratio in these spans.

    None: none of ten fitted.
    """
    for _ in range(10):
        area = h * w * generator.uniform(*scale)
        wide = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        part_h, part_w = round(math.sqrt(area / wide)), round(math.sqrt(area * wide))
        if 0 < part_h <= h and 0 < part_w <= w:
            y, x = generator.integers(0, h - part_h + 1), generator.integers(0, w - part_w + 1)
            return int(y), int(x), part_h, part_w
    return None


def _check_span(name: str, span: Span, most: float = math.inf) -> None:
    """Refuse one that goes down, or too far up."""
    low, high = span
    if low > high:
        raise ConfigError(f"{name} goes from {low} to {high}; give the smaller number first")
    if high > most:
        raise ConfigError(f"{name} goes up to {high}, and a part is at most the whole; give {most} or less")
