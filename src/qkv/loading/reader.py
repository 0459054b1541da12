"""A Transformer with its tokenizer: texts in, vectors out. What language models and encoders have in common."""

import json
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import torch
import torch.nn.functional as F

from qkv.data import Tokenizer
from qkv.data.pictures import PicturesConfig
from qkv.data.reads import Read, side_by_side
from qkv.errors import ConfigError
from qkv.inspect import AttentionMaps, AttentionRecorder, Inspection, draw_attention
from qkv.inspect.attention import patch_names
from qkv.loading.facts import Facts
from qkv.loading.ready import Embeds, check_vocabulary
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.nn.embedders import PatchEmbedderConfig, TokenEmbedderConfig
from qkv.nn.heads import EmbeddingHeadConfig
from qkv.nn.pooling import POOLS, PoolName
from qkv.ops.patches import unpatchify
from qkv.recorder import Recorder
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens

NOTHING = Facts()
_ROW = 4096  # tokens that are read at once


@dataclass(frozen=True)
class Reader(Embeds):
    """Base of what reads texts.

    Attributes:
        model: In evaluation mode.
        tokenizer: None where there is none (a model of vectors).
        facts: What is known of it besides.
    """

    model: Transformer
    tokenizer: Tokenizer | None = None
    facts: Facts = NOTHING

    @property
    def config(self) -> TransformerConfig:
        """What the model was built from."""
        return self.model.config

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the model; None: it reads something else."""
        embed = self.config.embed
        return embed.vocab_size if isinstance(embed, TokenEmbedderConfig) else None

    def check(self, source: Path) -> None:
        check_vocabulary(self.tokenizer, self.vocab_size, source)

    def files(self) -> dict[str, bytes]:
        files = {} if self.tokenizer is None else self.tokenizer.files()
        if self.tokenizer is not None:
            settings = json.loads(files["tokenizer_config.json"])
            pad = self.facts.pad_id
            more = {"pad_token": None if pad is None else self.tokenizer.name_of(pad)}
            more |= {"padding_side": self.facts.pad_side, "model_max_length": self.config.limit}
            settings |= {key: value for key, value in more.items() if value}
            files["tokenizer_config.json"] = json.dumps(settings, indent=2).encode()
        return files

    @abstractmethod
    def read(self, texts: Sequence[str]) -> list[Read]:
        """What each text is read as.

        Raises:
            ConfigError: There is no tokenizer, or a text that it does not know.
        """

    def reads(self, inputs: Any) -> list[Read]:
        """What one input or several are read as; arguments and errors as in `embed`."""
        if not isinstance(inputs, Iterable):
            raise ConfigError(f"{inputs!r} is nothing that the model reads; give a text, texts, or the ids of each")
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        words = [text for text in texts if isinstance(text, str)]
        if words and len(words) != len(texts):
            raise ConfigError("some inputs are texts and others are not; give texts, or the ids of each")
        return self.read(words) if words else [Read(text) for text in texts if not isinstance(text, str)]

    @final
    def embed(
        self,
        inputs: Any,
        *,
        pool: PoolName | Literal["own"] | None = "own",
        unit: bool | None = None,
    ) -> "Float[Tensor, 'N D'] | list[Float[Tensor, 'T D']]":
        """A vector for each input: texts of any lengths, or pictures, are read side by side, without padding.

        Args:
            inputs: One, or several: a text, or the token ids of each, with their special tokens; where the model reads
                pictures, the path of a file, a `PIL.Image`, or values (C, H, W) that are normalised already.
            pool: From the tokens of a text to one vector: 'mean' of all, or the 'first'; 'own': what the model was made
                for, where its head or its folder says so, else the class token before patches, else the mean. None: the
                stream of each text as it is, after the final norm (`last_hidden_state` of `transformers`).
            unit: Whether vectors are scaled to length 1, so that products of two are cosines. None: where the folder
                of the model says so. Not of streams.

        Returns:
            (N, D) on the CPU, one row for each input; with `pool=None` a list of (T, D).

        Raises:
            ConfigError: There is no tokenizer, or an input is empty, longer than the model can read, or no whole
                patches.
            FileError: There is no such picture, or it cannot be read.
        """
        rows = self.reads(inputs)
        self._check_lengths(rows)
        embed = self.config.embed
        head = self.config.head if pool == "own" and isinstance(self.config.head, EmbeddingHeadConfig) else None
        usual: PoolName = "first" if isinstance(embed, PatchEmbedderConfig) and embed.prefix else "mean"
        chosen = (self.facts.pool or usual) if pool == "own" else pool
        if chosen is not None and chosen not in POOLS:
            raise ConfigError(f"pool={pool!r} is unknown; give {', '.join(map(repr, POOLS))}, 'own' or None")
        made: list[Tensor] = [torch.empty(0)] * len(rows)
        for places in _batches([len(row.values) for row in rows]):
            stream, tokens = self._stream([rows[i] for i in places])
            if head is not None:
                with torch.inference_mode():
                    parts = self.model.readout(stream, tokens)
            elif chosen is None:
                parts = stream[0].split([len(rows[i].values) for i in places])
            else:
                parts = POOLS[chosen].build(self.config.d_model)(stream, tokens)
            for place, part in zip(places, parts, strict=True):
                made[place] = part.float().cpu()
        if chosen is None:
            return made
        vectors = torch.stack(made) if made else torch.empty(0, (head and head.width) or self.config.d_model)
        return F.normalize(vectors, dim=-1) if (self.facts.unit if unit is None else unit) else vectors

    @final
    def attention(self, item: Any, *, layers: Collection[int] | None = None) -> AttentionMaps:
        """Which tokens each token of a text or a picture attends to, in every layer and head.

        Args:
            item: A text, the ids of its tokens, or a picture; as one of the inputs of `embed`.
            layers: The numbers of the layers of attention to look at, counted from 0; None: all.

        Raises:
            ConfigError: As in `embed`, there is no such attention, or there are more weights than memory should hold.
            FileError: There is no such picture, or it cannot be read.
        """
        (read,) = rows = self.reads([item])
        self._check_lengths(rows)
        recorder = AttentionRecorder(layers)
        self._stream(rows, recorder)
        if not recorder.weights:
            raise ConfigError(f"the model has no attention{'' if layers is None else f' with numbers {layers}'}")
        found = tuple(recorder.names), tuple(recorder.weights), tuple(recorder.differences)
        if read.grid is None:
            ids = [int(token) for token in read.values]
            names = map(str, ids) if self.tokenizer is None else self.tokenizer.names(ids)
            return AttentionMaps(tuple(names), *found)
        embed = self.config.embed
        assert isinstance(embed, PatchEmbedderConfig)
        values = torch.as_tensor(read.values)[read.prefix :]
        pixels = _as_seen(unpatchify(values, read.grid, embed.patch).float(), self.facts.pictures)
        return AttentionMaps(tuple(patch_names(read.grid, read.prefix)), *found, read.grid, pixels)

    def inspect(self, given: str, *, translation: str | None = None, **how: Any) -> Inspection:
        if translation is not None:
            raise ConfigError(f"translation is for models of pairs, and this is {self.what}; leave it out")
        found = self.attention(given)
        size = f"{len(found.tokens)} tokens in {len(found.layers)} layers"
        says = f"{size}; weights times values are what the layers put out up to {max(found.differences):.1e}"
        return Inspection("attention", says, partial(draw_attention, found, **how))

    def _check_lengths(self, rows: Sequence[Read]) -> None:
        for number, row in enumerate(rows, 1):
            n, limit = len(row.values), self.config.limit
            if n == 0:
                raise ConfigError(f"input {number} of {len(rows)} has no tokens; leave it out")
            if limit is not None and n > limit:
                raise ConfigError(
                    f"input {number} of {len(rows)} has {n} tokens and the model reads {limit}; cut it, or split it"
                )

    @torch.inference_mode()
    def _stream(self, rows: Sequence[Read], recorder: Recorder | None = None) -> tuple[Float[Tensor, "1 T D"], Tokens]:
        """The stream of texts side by side in one row, and where they stand."""
        if self.config.embed.types is None:
            rows = [row._replace(types=None) for row in rows]
        inputs, tokens = side_by_side(rows, next(self.model.parameters()).device)
        if inputs.is_floating_point():
            inputs = inputs.to(next(self.model.parameters()).dtype)
        return self.model.encode(inputs, tokens, recorder=recorder)[0], tokens


def _as_seen(values: Float[Tensor, "C H W"], pictures: PicturesConfig | None) -> Float[Tensor, "C H W"]:
    """From 0 to 1, for people: not normalised, or where nobody says how it was from the darkest to the brightest."""
    if pictures is None:
        low, high = values.min(), values.max()
        return (values - low) / (high - low).clamp(min=1e-9)
    mean, std = (torch.tensor(x)[:, None, None] for x in (pictures.mean, pictures.std))
    return (values * std + mean).clamp(0, 1)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The numbers of texts that are read at once: of like lengths, so many tokens in all, or a single longer one."""
    group: list[int] = []
    n = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and n + lengths[i] > _ROW:
            yield group
            group, n = [], 0
        group.append(i)
        n += lengths[i]
    if group:
        yield group
