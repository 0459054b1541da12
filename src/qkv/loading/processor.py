"""How a folder in Hugging Face's layout says its pictures are read: `preprocessor_config.json`, in and out."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, get_args

from qkv.checkpoints.families.config_reader import ConfigReader
from qkv.checkpoints.files import read_json
from qkv.data.pictures import PatchBudgetConfig, PicturesConfig, Resample, Size
from qkv.errors import ConfigError, FileError

FILE: Final = "preprocessor_config.json"
_NEWER: Final = ("processor_config.json", "image_processor")
"""Where a model of texts and pictures has it among its other processors."""
_RESAMPLES: Final[tuple[Resample, ...]] = get_args(Resample)
_LARGEST: Final = 1 << 14  # pixels of a side
_SIDES: Final = ("height", "width")
_HALF: Final = (0.5,) * 3
_CLIP: Final = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HARMLESS: Final = (
    "_processor_class", "_valid_processor_keys", "device", "disable_grouping", "image_seq_length", "input_data_format",
    "model_input_names", "num_channels", "processor_class", "return_tensors",
)  # fmt: skip


@dataclass(frozen=True)
class _Defaults:
    """What a processor does where its file does not say: for three colours.

    Attributes:
        values: Mean and deviation of each channel.
        square: Whether a size of one number is that of both sides, else of the shorter one.
        patches: How many patches a picture is made to have, of any shape; None: it is made of the size.
        rounded: Whether resizing rounds to 8 bits; DINOv3's makes values from 0 to 1 first, and they stay as they are.
    """

    resample: Resample
    values: tuple[tuple[float, ...], tuple[float, ...]] = (_HALF, _HALF)
    size: int = 224
    square: bool = True
    crop: int | None = None
    rounded: bool = True
    patches: PatchBudgetConfig | None = None


_OF_CLIP = _Defaults("bicubic", _CLIP, square=False, crop=224)
_PROCESSORS: Final = {
    "ViT": _Defaults("bilinear"),
    "DeiT": _Defaults("bicubic", size=256, crop=224),
    "Bit": _OF_CLIP,
    "CLIP": _OF_CLIP,
    "Siglip": _Defaults("bicubic"),
    "Siglip2": _Defaults("bilinear", patches=PatchBudgetConfig(patch=16, most=256)),
    "DINOv3ViT": _Defaults("bilinear", _IMAGENET, rounded=False),
}
"""By what the names of their classes begin with."""
_ENDS: Final = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
_OF_MODELS: Final = {
    "vit": "ViT", "deit": "DeiT", "dinov2": "Bit", "dinov2_with_registers": "Bit", "dinov3_vit": "DINOv3ViT",
    "clip": "CLIP", "clip_vision_model": "CLIP", "siglip": "Siglip", "siglip_vision_model": "Siglip",
    "siglip2": "Siglip2", "siglip2_vision_model": "Siglip2",
}  # fmt: skip
"""Whose processor a model has where the file names none, by its `model_type`."""


def read_processor(folder: Path, channels: int) -> PicturesConfig | None:
    """How the pictures of a model are read; None: its folder does not say.

    What a file leaves out is as by default in the processor that it names.

    Raises:
        FileError: The file is damaged, or asks for what qkv does not do.
    """
    name, inner = _NEWER
    path, data = folder / FILE, None
    if path.is_file():
        data = read_json(path)
    elif (folder / name).is_file():
        path, data = folder / name, read_json(folder / name).get(inner)
    if data is None:
        return None
    if not isinstance(data, dict):
        raise FileError(f"{path}: {inner!r} is {data!r} and must be a mapping; fix the file")
    try:
        return _read(ConfigReader(cast(dict[str, Any], data), str(path)), read_json(folder / "config.json"), channels)
    except ConfigError as error:
        raise FileError(f"{path}: {error}") from None


def write_processor(pictures: PicturesConfig) -> bytes:
    """What the file says: the inverse of `read_processor`. All is spelled out, so that no default of theirs counts."""
    size = pictures.size
    kind = "Bit" if pictures.crop is not None or isinstance(size, int) else "ViT"
    kind = "Siglip2" if isinstance(size, PatchBudgetConfig) else kind
    said: dict[str, Any] = {
        "image_processor_type": ("DINOv3ViT" if not pictures.rounded else kind) + _ENDS[0],
        "do_convert_rgb": pictures.channels == 3,
        "do_resize": size is not None,
        "resample": _RESAMPLES.index(pictures.resample),
        "do_center_crop": pictures.crop is not None,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": pictures.mean,
        "image_std": pictures.std,
    }
    if isinstance(size, PatchBudgetConfig):
        said |= {"patch_size": size.patch, "max_num_patches": size.most}
    elif size is not None:
        said["size"] = {"shortest_edge": size} if isinstance(size, int) else dict(zip(_SIDES, size, strict=True))
    if pictures.crop is not None:
        said["crop_size"] = dict(zip(_SIDES, pictures.crop, strict=True))
    return (json.dumps(said, indent=2) + "\n").encode()


def _read(source: ConfigReader, model: dict[str, Any], channels: int) -> PicturesConfig:
    own = _defaults(source, str(model.get("model_type")))
    square = source.take("default_to_square", bool, own.square)
    # Each key is read even where its step is off: whether it is understood does not depend on another.
    size = _size(source, "size", own.size, square=square) if own.patches is None else _patches(source, own.patches)
    crop = _size(source, "crop_size", own.crop or own.size, square=True)
    mean, std = (
        _per_channel(source, key, default, channels)
        for key, default in zip(("image_mean", "image_std"), own.values, strict=True)
    )
    code = source.take("resample", int, _RESAMPLES.index(own.resample))
    if not 0 <= code < len(_RESAMPLES):
        raise FileError(f"{source.source}: 'resample' is {code}; pillow has 0 to {len(_RESAMPLES) - 1}; fix the file")
    if isinstance(crop, int):
        raise FileError(f"{source.source}: 'crop_size' is of one side, and must be a height and a width; fix the file")
    factor = source.take_factor("rescale_factor", 1 / 255)
    factor = 255 * factor if source.take("do_rescale", bool, True) else 255.0
    if not source.take("do_normalize", bool, True):
        mean, std = (0.0,) * channels, (1.0,) * channels
    source.take("do_convert_rgb", bool, True)  # a model of three colours is given three, whatever it says
    for key, value in (("data_format", "channels_first"), ("do_pad", False), ("pad_size", None)):
        source.require(key, value)
    resized, cropped = (
        source.take("do_resize", bool, True),
        source.take("do_center_crop", bool, own.crop is not None),
    )
    source.finish(*_HARMLESS)
    return PicturesConfig(
        channels=1 if channels == 1 else 3,
        size=size if resized else None,
        resample=_RESAMPLES[code],
        crop=crop if cropped else None,
        rounded=own.rounded,
        # (factor · x - mean) / std, of values x from 0 to 1
        mean=tuple(x / factor for x in mean),
        std=tuple(x / factor for x in std),
    )


def _defaults(source: ConfigReader, model: str) -> _Defaults:
    """Those of the processor that a file names, or of the one that such a model has."""
    names = [source.optional(key, str) for key in ("image_processor_type", "feature_extractor_type")]
    named = names[0] or names[1] or _OF_MODELS.get(model, "") + _ENDS[0]
    stems = [named.removesuffix(end) for end in _ENDS if named.endswith(end)]
    found = next((_PROCESSORS[stem] for stem in stems if stem in _PROCESSORS), None)
    if found is None:
        known = ", ".join(stem + _ENDS[0] for stem in _PROCESSORS)
        raise FileError(
            f"{source.source}: 'image_processor_type' is {named!r}; qkv knows {known}; without the file it takes "
            "values that are normalised already"
        )
    return found


def _size(source: ConfigReader, key: str, default: int, *, square: bool) -> Size | int:
    """Height and width, or the pixels of the shorter side."""
    sides: tuple[Any, ...]
    match source.take(key, object, default):
        case {"height": height, "width": width, **rest} if not any(rest.values()):
            sides = (height, width)
        case {"shortest_edge": side, **rest} if not any(rest.values()):
            sides = (side,)
        case [height, width]:
            sides = (height, width)
        case side:
            sides = (side, side) if square else (side,)
    for side in sides:
        if type(side) is not int or not 1 <= side <= _LARGEST:
            raise FileError(
                f"{source.source}: {key!r} says {side!r}, and qkv reads a height and a width, or a shortest_edge, each "
                f"from 1 to {_LARGEST}"
            )
    return (sides[0], sides[1]) if len(sides) == 2 else sides[0]


def _patches(source: ConfigReader, default: PatchBudgetConfig) -> PatchBudgetConfig:
    source.require("size", None)
    return PatchBudgetConfig(
        patch=source.take_positive("patch_size", default.patch, _LARGEST),
        most=source.take_positive("max_num_patches", default.most, _LARGEST),
    )


def _per_channel(source: ConfigReader, key: str, default: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A number for each channel; one alone is that of all."""
    said: Any = source.take(key, object, default[0] if len(set(default)) == 1 else list(default))
    values: list[Any] = said if isinstance(said, list) else [said] * channels
    if len(values) != channels or not all(type(x) in (int, float) and abs(x) < _LARGEST for x in values):
        raise FileError(f"{source.source}: {key!r} is {said!r} and must be a number for each of {channels} channels")
    return tuple(float(x) for x in values)
