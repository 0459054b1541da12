"""What turns raw input into the stream."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import Config, Count, Share, config
from qkv.errors import ConfigError
from qkv.nn.norms import NormConfig
from qkv.nn.part import Part
from qkv.nn.positions import PositionTableConfig
from qkv.nn.quantised import Table
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import Tokens


@config
class EmbedderConfig(Config, ABC):
    """Base of the configs of embedders.

    Attributes:
        position: Table of positions that is added; None where attention knows them (rotary), or nothing does.
        types: Kinds of tokens (`Tokens.types`), of which each has a vector that is added (Devlin et al. 2019, BERT,
            section 3); None: they are not told apart.
        norm: Norm of the sum; None: there is none.
        width: Width of the embeddings, which a linear map then brings to that of the stream (Lan et al. 2020, ALBERT,
            section 3.1); None: they are as wide as the stream.
        dropout: Probability that an element of the embeddings is dropped in training.
    """

    position: PositionTableConfig | None = None
    types: Count | None = None
    norm: NormConfig | None = None
    width: Count | None = None
    dropout: Share = 0.0

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest document that the table of positions admits; None: any."""
        return None if self.position is None else self.position.max_length

    takes: ClassVar[str] = "inputs  (T, …)"
    """The input in a drawing."""

    @property
    def left_open(self) -> str:
        """What sets a size that the config leaves open, such as `set by the tokenizer`; empty: nothing is open."""
        return ""

    def notes(self, d_model: int) -> list[str]:
        """What a drawing says of it, position aside."""
        return [self.replace(position=None).describe()]

    def for_vocabulary(self, n: int) -> "EmbedderConfig":
        """The same for ids of a tokenizer with `n` tokens; `ConfigError` if it takes no ids, or fewer."""
        raise ConfigError(f"the data are text and model.embed is {self.tag()}; use TokenEmbedder")

    def for_vectors(self, n: int) -> "EmbedderConfig":
        """The same for vectors of `n` numbers; `ConfigError` if it takes no vectors, or others."""
        raise ConfigError(f"the data are vectors and model.embed is {self.tag()}; use VectorEmbedder")

    def for_pictures(self, channels: int) -> "EmbedderConfig":
        """The same for pictures of `channels` values a pixel; `ConfigError` if it takes no pictures, or others."""
        raise ConfigError(f"the data are pictures and model.embed is {self.tag()}; use PatchEmbedder")

    def closed(self) -> "EmbedderConfig":
        """The same with a size for each that only data would set; here there is none."""
        return self

    def build(self, d_model: int) -> "Embedder":
        """The embedder for a stream of width `d_model`."""
        return self._build(d_model)


class Embedder(Part, ABC):
    """Base of the embedders: the input's own vectors, plus positions and types, normed, after dropout.

    Attributes:
        width: Of the input's own vectors.
    """

    def __init__(self, config: EmbedderConfig, d_model: int) -> None:
        super().__init__()
        self.width = config.width or d_model
        self.position = config.position.build(self.width) if config.position else None
        self.types = nn.Parameter(torch.empty(config.types, self.width)) if config.types else None
        self.norm = config.norm.build(self.width) if config.norm else None
        self.widen = nn.Linear(self.width, d_model) if config.width else None
        self.dropout = config.dropout

    def forward(self, inputs: Tensor, tokens: Tokens) -> Float[Tensor, "B T D"]:
        """The stream that the first block sees.

        Raises:
            ConfigError: A token is of a kind that the embedder does not have (on CPUs).
        """
        x = self.embed(inputs)
        if self.position is not None:
            x = x + self.position(tokens, x.dtype)
        x = self.by_kind(x, tokens)
        x = x if self.norm is None else self.norm(x)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return x if self.widen is None else self.widen(x)

    def by_kind(self, x: Float[Tensor, "B T D"], tokens: Tokens) -> Float[Tensor, "B T D"]:
        """The vectors after what the kinds of tokens make of them: here that of each kind is added."""
        if self.types is not None:
            return x + (self.types[0] if tokens.types is None else of_kinds(tokens.types, self.types)).to(x.dtype)
        if tokens.types is not None:
            raise ConfigError("the tokens have types and the embedder does not tell them apart; leave them out")
        return x

    def flops(self) -> int:
        """Floating-point operations for one token; the tables of positions and types are looked up."""
        looked_up = [] if self.position is None else [*self.position.parameters()]
        looked_up += [] if self.types is None else [self.types]
        return self.matrix_flops() - 2 * sum(p.numel() for p in looked_up)

    def example(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        """Random input, one for each token, with floating-point numbers in float32."""
        name = type(self).__name__
        raise ConfigError(f"no input can be drawn for a model with the embedder {name}; check a part of it")

    def example_tokens(self, tokens: Tokens) -> Tokens:
        """Where the examples stand, if their documents stand there: of each type, with what positions ask for."""
        return tokens if self.types is None else tokens.with_types(tokens.index % len(self.types))

    @abstractmethod
    def embed(self, inputs: Tensor) -> Float[Tensor, "B T D"]:
        """A vector for each input, without position."""

    @property
    def table(self) -> Table | None:
        """The vectors of all tokens, for a head that shares them; None where the input is no vocabulary."""
        return None


def of_kinds(types: Int[Tensor, "B T"], vectors: Float[Tensor, "kinds D"]) -> Float[Tensor, "B T D"]:
    """The vector of each token's kind. Raises `ConfigError` where there is no such kind (on CPUs)."""
    try:
        return F.embedding(types, vectors)
    except IndexError:
        raise ConfigError(
            f"types from {int(types.min())} to {int(types.max())} do not fit an embedder that tells {len(vectors)} "
            "apart; a type counts from 0"
        ) from None
