"""A model without a causal mask, with what it reads by: texts or pictures in; vectors, classes and masked words out."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import checked
from qkv.data.pictures import PicturesConfig
from qkv.data.reads import Read
from qkv.data.sources import open_vectors, series_of
from qkv.errors import ConfigError, FileError
from qkv.loading.processor import FILE as PROCESSOR
from qkv.loading.processor import write_processor
from qkv.loading.reader import Reader
from qkv.nn.embedders import EmbedderConfig, PatchEmbedderConfig, VectorEmbedderConfig
from qkv.nn.heads import ClassHead, ClassHeadConfig, LMHeadConfig, SquaredErrorConfig
from qkv.ops.patches import grid, patchify
from qkv.shapes import Float, Tensor
from qkv.yaml_files import expand_home


class Guess(NamedTuple):
    """A class, or a word, and how likely it is.

    Attributes:
        label: Its name.
        probability: From 0 to 1.
    """

    label: str
    probability: float


class Tagged(NamedTuple):
    """A word of a text, its class, and how likely that is.

    Attributes:
        word: As it stands in the text.
        label: The name of the class.
        probability: From 0 to 1.
    """

    word: str
    label: str
    probability: float


@final
@dataclass(frozen=True)
class Encoder(Reader):
    """A model whose tokens see each other both ways, with its tokenizer, or with how it reads pictures."""

    what = "an encoder"
    verbs = "qkv embed, fill, classify or show"

    def reads(self, inputs: Any) -> list[Read]:
        embed = self.config.embed
        if isinstance(embed, VectorEmbedderConfig):
            one = not isinstance(inputs, Iterable) or isinstance(inputs, str) or getattr(inputs, "ndim", 0) == 2
            return [_read_series(each) for each in ([inputs] if one else inputs)]
        if not isinstance(embed, PatchEmbedderConfig):
            return super().reads(inputs)
        one = not isinstance(inputs, Iterable) or isinstance(inputs, str) or getattr(inputs, "ndim", 0) == 3
        return [self._read_picture(each, embed) for each in ([inputs] if one else inputs)]

    def _read_picture(self, given: Any, embed: PatchEmbedderConfig) -> Read:
        if isinstance(given, Tensor):
            return pixels_of(given, embed)
        if (pictures := self.facts.pictures) is None:
            raise ConfigError(
                "it is not known how the model's pictures are read; put preprocessor_config.json into its folder, or "
                "give values (C, H, W) that are normalised already"
            )
        return patches_of(pictures.read(given), pictures, embed)

    def read(self, texts: Sequence[str]) -> list[Read]:
        if self.tokenizer is None:
            raise ConfigError("the model has no tokenizer; give the ids of each text, with its special tokens")
        reads = [Read(framed.ids, framed.types) for framed in self.tokenizer.encode_framed(texts)]
        if (n := self.facts.fill) is None:
            return reads
        return [Read([*read.values, *[self.facts.pad_id or 0] * (n - len(read.values))]) for read in reads]

    def files(self) -> dict[str, bytes]:
        files = super().files()
        if self.tokenizer is not None:
            before, after = self.tokenizer.frame
            names = dict(zip(("cls_token", "sep_token"), map(self.tokenizer.name_of, before + after), strict=False))
            settings = json.loads(files["tokenizer_config.json"]) | (names if len(before) == len(after) == 1 else {})
            files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
        if self.facts.pictures is not None:
            files[PROCESSOR] = write_processor(self.facts.pictures)
        if self.facts.pool is None:
            return files
        return files | _as_sentence_transformers(self.facts.pool, self.config.d_model, unit=self.facts.unit)

    @checked
    def classify(self, inputs: Any, *, top: int = 5) -> list[list[Guess]]:
        """The likeliest classes of each text or picture, the likeliest first.

        Where an item may be of several classes, each of them has a probability of its own.

        Args:
            inputs: One, or several of any lengths, as for `embed`.
            top: How many classes.

        Raises:
            ConfigError: The model has no classes of whole inputs, or one does not fit it.
            FileError: There is no such picture, or it cannot be read.
        """
        head, outputs = self._classified(inputs)
        labels = self.facts.labels or tuple(f"class {i}" for i in range(outputs.shape[-1]))
        return [best(row, labels.__getitem__, top) for row in head.objective.probabilities(outputs)]

    def tag(self, inputs: str | Sequence[str] | Sequence[Sequence[str]]) -> list[list[Tagged]]:
        """The likeliest class of each word of a text or of several, by a model with classes of tokens.

        Args:
            inputs: A text, which is split at spaces, or texts; or the words of each.

        Raises:
            ConfigError: The model has no classes of tokens, or no tokenizer, or a text does not fit it.
        """
        head = self.config.head
        if not self.gives_tags or self.tokenizer is None:
            found = "none" if head is None else head.tag()
            raise ConfigError(f"the model's head is {found} and gives no classes of words; use `classify` or `embed`")
        texts = [inputs] if isinstance(inputs, str) else inputs
        words = [text.split() if isinstance(text, str) else list(text) for text in texts]
        made = [self.tokenizer.encode_words(each) for each in words]
        outputs = self._outputs([Read(framed.ids, framed.types) for framed, _ in made])[0]
        labels = self.facts.labels or tuple(f"class {i}" for i in range(outputs.shape[-1]))
        parts = outputs.float().softmax(-1).split([len(framed.ids) for framed, _ in made])
        return [
            [
                Tagged(word, *best(p[at], labels.__getitem__, 1)[0])
                for word, at in zip(each, firsts, strict=True)
                if at is not None
            ]
            for each, (_, firsts), p in zip(words, made, parts, strict=True)
        ]

    @property
    def gives_tags(self) -> bool:
        """Whether `tag` is what it is for, and not `classify`."""
        head = self.config.head
        return isinstance(head, ClassHeadConfig) and head.pool is None and head.n_classes is not None

    @property
    def gives_numbers(self) -> bool:
        """Whether `predict` is what it is for, and not `classify`."""
        head = self.config.head
        return isinstance(head, ClassHeadConfig) and isinstance(head.objective, SquaredErrorConfig)

    def predict(self, inputs: Any) -> Float[Tensor, "N numbers"]:
        """The numbers that a model of regression finds for each text or picture, in the units that it was trained on.

        Args:
            inputs: As for `classify`.

        Raises:
            ConfigError: The model gives classes, or an input does not fit it.
            FileError: There is no such picture, or it cannot be read.
        """
        if not self.gives_numbers:
            raise ConfigError("the model's head gives no numbers; use `classify`, `embed` or `fill`")
        mean, std = self.facts.scale or (0.0, 1.0)
        return self._classified(inputs)[1] * std + mean

    def in_units(self) -> "Encoder":
        """The same, whose head itself gives numbers in the units that it was trained on."""
        if self.facts.scale is None:
            return self
        (mean, std), head = self.facts.scale, self.model.head
        assert isinstance(head, ClassHead)
        assert head.proj is not None
        proj = head.proj
        proj.weight = nn.Parameter(proj.weight.detach() * std)  # not in place: the old ones may be mapped from a file
        proj.bias = nn.Parameter(proj.bias.detach() * std + mean)
        return replace(self, facts=self.facts.replace(scale=None))

    def _classified(self, inputs: Any) -> tuple[ClassHeadConfig, Float[Tensor, "N out"]]:
        """The head, and what it makes of each input, in float32 or wider."""
        head = self.config.head
        if not isinstance(head, ClassHeadConfig) or head.n_classes is None or head.pool is None:
            found = "none" if head is None else head.tag()
            raise ConfigError(f"the model's head is {found} and gives no classes of its inputs; use `embed` or `fill`")
        outputs = self._outputs(self.reads(inputs))
        return head, outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    @checked
    def fill(self, text: str, *, top: int = 5) -> list[list[Guess]]:
        """The likeliest tokens for each mask in a text, from left to right.

        Args:
            text: With the name of the tokenizer's mask token in it, such as `[MASK]`.
            top: How many tokens for each.

        Raises:
            ConfigError: The model has no masked language model, or the text no mask.
        """
        if not isinstance(self.config.head, LMHeadConfig):
            raise ConfigError("the model has no head over its vocabulary; use `embed`, or a masked language model")
        tokenizer = self.tokenizer
        if tokenizer is None or tokenizer.mask is None:
            raise ConfigError("the tokenizer names no mask token; give its folder a 'mask_token'")
        name = tokenizer.name_of(tokenizer.mask)
        (read,) = [Read(framed.ids, framed.types) for framed in tokenizer.encode_framed([text], special=True)]
        at = [i for i, token in enumerate(read.values) if token == tokenizer.mask]
        if not at:
            raise ConfigError(f"there is no {name} in the text; put one where the model is to say what stands there")
        (logits,) = self._outputs([read])
        return [best(logits[i].float().softmax(-1), tokenizer.text_of, top) for i in at]

    @torch.inference_mode()
    def _outputs(self, rows: Sequence[Read]) -> Float[Tensor, "..."]:
        """The outputs of the head for texts side by side."""
        self._check_lengths(rows)
        stream, tokens = self._stream(rows)
        return self.model.readout(stream, tokens)


def _read_series(given: Any) -> Read:
    """A series of vectors, (T, features), or that of a .npy or .csv file."""
    if isinstance(given, str | Path):
        path = expand_home(given)
        series = list(series_of(open_vectors(path), path))
        if len(series) != 1:
            raise FileError(f"{path}: holds {len(series)} series; give each a file of its own")
        return Read(torch.tensor(series[0]))
    series = torch.as_tensor(given)
    if series.dim() != 2 or not series.is_floating_point():
        raise ConfigError(f"a series is floats (T, features), found {series.dtype} {tuple(series.shape)}")
    return Read(series)


def patches_of(picture: np.ndarray, pictures: PicturesConfig, embed: EmbedderConfig) -> Read:
    """A picture (C, H, W) in uint8 as a model with that embedder reads it.

    Raises:
        ConfigError: The embedder reads no pictures, or this one is no whole patches.
    """
    own = picture_embedder(embed)
    return _behind_prefix(pictures.patches(picture, own.patch), grid(picture.shape, own.patch), own)


def _behind_prefix(patches: Tensor, grid: tuple[int, int], embed: PatchEmbedderConfig) -> Read:
    return Read(F.pad(patches, (0, 0, embed.prefix, 0)), grid=grid, prefix=embed.prefix)


def picture_embedder(embed: EmbedderConfig) -> PatchEmbedderConfig:
    """The embedder, if it is one of pictures; else `ConfigError`."""
    if not isinstance(embed, PatchEmbedderConfig):
        raise ConfigError(f"the model's embedder is {embed.tag()} and reads no pictures; use PatchEmbedder")
    return embed


def pixels_of(values: Tensor, embed: PatchEmbedderConfig) -> Read:
    """Values (C, H, W) that are normalised already, as a model with that embedder reads them.

    Raises:
        ConfigError: They are of another shape or kind, or no whole patches.
    """
    if values.ndim != 3 or len(values) != embed.channels or not values.is_floating_point():
        raise ConfigError(
            f"a picture is {tuple(values.shape)} in {values.dtype} and must be ({embed.channels}, height, width) of "
            "floats, normalised as the model was trained"
        )
    return _behind_prefix(patchify(values, embed.patch), grid(values.shape, embed.patch), embed)


def _as_sentence_transformers(pool: str, width: int, *, unit: bool) -> dict[str, bytes]:
    """The files by which that library knows how one vector is made of a text's."""
    names = ["Transformer", "Pooling", "Normalize"] if unit else ["Transformer", "Pooling"]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    modes = {"pooling_mode_cls_token": pool == "first", "pooling_mode_mean_tokens": pool == "mean"}
    made = {"modules.json": modules, "1_Pooling/config.json": {"word_embedding_dimension": width} | modes}
    return {name: json.dumps(data, indent=2).encode() for name, data in made.items()}


def best(probabilities: Tensor, name: Callable[[int], str], top: int) -> list[Guess]:
    """The `top` likeliest of so many, the likeliest first. Raises `ConfigError` where that is below 1."""
    if top < 1:
        raise ConfigError(f"top={top} must be at least 1")
    values, places = probabilities.topk(min(top, len(probabilities)))
    return [Guess(name(i), p) for i, p in zip(places.tolist(), values.tolist(), strict=True)]
