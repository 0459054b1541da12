"""Heads of a model: the stream to outputs, and the loss that trains them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import nn

from qkv.config import Config, Positive, Share, config
from qkv.errors import ConfigError
from qkv.nn.embedders.embedder import EmbedderConfig
from qkv.nn.embedders.token import TokenEmbedderConfig
from qkv.nn.embedders.vector import VectorEmbedderConfig
from qkv.nn.part import Part
from qkv.nn.quantised import Packed, Table, pack_table, project
from qkv.ops.loss import IGNORE, linear_cross_entropy
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import Tokens


class Head(Part, ABC):
    """Base of the heads.

    `table` is the embedder's own table of vectors, for a head that shares it: there is then one parameter and one name,
    so nothing that copies, shards or saves parameters can part them.
    """

    def flops(self, table: Table | None) -> int:
        """Floating-point operations for one token."""
        return self.matrix_flops()

    @abstractmethod
    def forward(self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None) -> Float[Tensor, "B ..."]:
        """The outputs: for each token, or of a head that pools for each document."""

    @abstractmethod
    def loss(
        self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None, targets: Tensor, scale: float
    ) -> Float[Tensor, ""]:
        """`scale` times the loss summed over the tokens that have a target."""

    @abstractmethod
    def count(self, targets: Tensor, tokens: Tokens) -> int:
        """How many tokens have a target."""


def _check_targets(targets: Tensor, shape: Sequence[int]) -> None:
    if targets.shape != torch.Size(shape):
        raise ConfigError(
            f"targets are {tuple(targets.shape)} and the outputs {tuple(shape)}; give each token its target"
        )


@config
class HeadConfig(Config, ABC):
    """Base of the configs of heads."""

    gives: ClassVar[str] = "outputs  (T, …)"
    """The output in a drawing."""

    def left_open(self, embed: EmbedderConfig) -> str:
        """What sets a size that it leaves open: by default what sets that of the embedder."""
        return embed.left_open

    def notes(self, d_model: int, embed: EmbedderConfig) -> list[str]:
        """What a drawing says of it."""
        return [self.describe()]

    def for_vocabulary(self, n: int) -> "HeadConfig":
        """The same for targets that are ids of a tokenizer with `n` tokens; `ConfigError` if it has no use for ids."""
        return self

    def for_vectors(self, n: int) -> "HeadConfig":
        """The same for targets that are vectors of `n` numbers; `ConfigError` if its own are others."""
        return self

    @abstractmethod
    def build(self, d_model: int, embed: EmbedderConfig) -> Head:
        """The head of a model of width `d_model` with this embedder; `ConfigError` if they do not fit."""


@final
@config
class LMHeadConfig(HeadConfig):
    """Logits over the vocabulary of the embedder, trained with cross-entropy.

    Attributes:
        tied: Whether it uses the embedder's table as its weight (Press and Wolf 2017).
        softcap: c in c · tanh(logit / c) (Gemma Team 2024, Gemma 2, section 2); None: logits are not bounded.
        bias: Whether each token has a bias.
        smoothing: Share of the target's probability that is spread over the vocabulary in training, the target
            included (Szegedy et al. 2016, section 7; Vaswani et al. 2017, section 5.4). Evaluation is without it.
    """

    tied: bool = True
    softcap: Positive | None = None
    bias: bool = False
    smoothing: Share = 0.0

    gives: ClassVar[str] = "logits  (T, vocabulary)"

    def notes(self, d_model: int, embed: EmbedderConfig) -> list[str]:
        n = embed.vocab_size if isinstance(embed, TokenEmbedderConfig) else None
        own = "with the embedder's table" if self.tied else "with a table of its own"
        return [f"{d_model:,} → {'…' if n is None else f'{n:,}'} logits, {own}"]

    def build(self, d_model: int, embed: EmbedderConfig) -> "LMHead":
        if not isinstance(embed, TokenEmbedderConfig) or embed.vocab_size is None:
            raise ConfigError(f"LMHead needs a TokenEmbedder with a vocab_size, found {embed.tag()}; use VectorHead")
        return LMHead(self, d_model, embed.vocab_size)


@final
class LMHead(Head):
    """Logits are products with the vectors of the vocabulary, so the head may share them."""

    def __init__(self, config: LMHeadConfig, d_model: int, vocab_size: int) -> None:
        super().__init__()
        self.weight: Table | None = None if config.tied else nn.Parameter(torch.empty(vocab_size, d_model))
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if config.bias else None
        self.softcap, self.smoothing = config.softcap, config.smoothing

    def flops(self, table: Table | None) -> int:
        weight = self._weight(table)
        return 2 * weight.in_features * weight.out_features if isinstance(weight, Packed) else 2 * weight.numel()

    def pack(self) -> None:
        pack_table(self)

    def _weight(self, table: Table | None) -> Tensor | Packed:
        weight = table if self.weight is None else self.weight
        assert weight is not None
        return weight

    def forward(self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None) -> Float[Tensor, "B T V"]:
        logits = project(x, self._weight(table))
        logits = logits if self.bias is None else logits + self.bias
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def loss(
        self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None, targets: Int[Tensor, "B T"], scale: float
    ) -> Float[Tensor, ""]:
        """Cross-entropy in nats, without the logits of all tokens at once."""
        _check_targets(targets, tokens.shape)
        targets = torch.where(tokens.valid, targets, IGNORE)
        weight = self._weight(table)
        if isinstance(weight, Packed):
            raise ConfigError("a packed head has no loss; load the model with a dtype such as float32")
        return linear_cross_entropy(
            x.flatten(0, 1),
            weight.to(x.dtype),
            targets.flatten(),
            bias=None if self.bias is None else self.bias.to(x.dtype),
            scale=scale,
            softcap=self.softcap,
            smoothing=self.smoothing if self.training else 0.0,
        )

    def count(self, targets: Int[Tensor, "B T"], tokens: Tokens) -> int:
        """How many tokens have a target: those that are no padding and whose target is not -100."""
        _check_targets(targets, tokens.shape)
        if targets.is_floating_point():
            raise ConfigError(f"targets are of {targets.dtype} and must be ids such as torch.long")
        return int(((targets != IGNORE) & tokens.valid).sum())


@final
@config
class VectorHeadConfig(HeadConfig):
    """A linear map to vectors, trained with the squared error.

    Attributes:
        n_out: Width of the output. None: that of the input vectors (prediction of the next one).
    """

    n_out: int | None = None

    gives: ClassVar[str] = "vectors  (T, out)"

    def left_open(self, embed: EmbedderConfig) -> str:
        return embed.left_open if self.n_out is None else ""

    def notes(self, d_model: int, embed: EmbedderConfig) -> list[str]:
        return [f"{d_model:,} → {'…' if self.n_out is None else f'{self.n_out:,}'} numbers"]

    def for_vocabulary(self, n: int) -> HeadConfig:
        raise ConfigError(f"the data are text and model.head is {self.tag()}; use LMHead")

    def for_vectors(self, n: int) -> "VectorHeadConfig":
        if self.n_out not in (None, n):
            raise ConfigError(
                f"the vectors have {n} features and model.head.n_out is {self.n_out}; the model predicts the next "
                "vector, so leave it out"
            )
        return self

    def build(self, d_model: int, embed: EmbedderConfig) -> "VectorHead":
        n_out = embed.n_features if self.n_out is None and isinstance(embed, VectorEmbedderConfig) else self.n_out
        if n_out is None:
            raise ConfigError(f"VectorHead.n_out is not set and {embed.tag()} gives no width; set n_out")
        return VectorHead(d_model, n_out)


@final
class VectorHead(Head):
    """One linear map."""

    def __init__(self, d_model: int, n_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_model, n_out)

    def forward(self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None) -> Float[Tensor, "B T out"]:
        return self.proj(x)

    def loss(
        self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None, targets: Tensor, scale: float
    ) -> Float[Tensor, ""]:
        """Squared error, averaged over the numbers of a vector and summed over the tokens that are no padding."""
        wide = torch.promote_types(x.dtype, torch.float32)
        _check_targets(targets, (*x.shape[:2], self.proj.out_features))
        error = (self.proj(x).to(wide) - targets.to(wide)).square().mean(-1)
        return torch.where(tokens.valid, error, 0.0).sum() * scale

    def count(self, targets: Tensor, tokens: Tokens) -> int:
        return int(tokens.valid.sum())
