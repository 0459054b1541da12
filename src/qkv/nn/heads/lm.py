"""The stream to logits over a vocabulary: of the next token, or of one that is masked."""

from typing import ClassVar, final

import torch
from torch import nn

from qkv.config import Positive, Share, config
from qkv.errors import ConfigError
from qkv.nn.embedders.embedder import EmbedderConfig
from qkv.nn.embedders.token import TokenEmbedderConfig
from qkv.nn.heads.head import Head, HeadConfig, check_targets
from qkv.nn.heads.transform import TransformConfig
from qkv.nn.quantised import Packed, Table, pack_table, project
from qkv.ops.loss import IGNORE, linear_cross_entropy
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import Tokens


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
        transform: What the stream goes through before (BERT's code); it brings the stream to the width of the
            embedder's table. None: nothing.
    """

    tied: bool = True
    softcap: Positive | None = None
    bias: bool = False
    smoothing: Share = 0.0
    transform: TransformConfig | None = None

    gives: ClassVar[str] = "logits  (T, vocabulary)"

    def notes(self, d_model: int, embed: EmbedderConfig) -> list[str]:
        n = embed.vocab_size if isinstance(embed, TokenEmbedderConfig) else None
        own = "with the embedder's table" if self.tied else "with a table of its own"
        return [f"{d_model:,} → {'…' if n is None else f'{n:,}'} logits, {own}"]

    def build(self, d_model: int, embed: EmbedderConfig) -> "LMHead":
        if not isinstance(embed, TokenEmbedderConfig) or embed.vocab_size is None:
            raise ConfigError(f"LMHead needs a TokenEmbedder with a vocab_size, found {embed.tag()}; use VectorHead")
        width = embed.width or d_model
        if width != d_model and self.transform is None:
            raise ConfigError(
                f"the vectors of the vocabulary are {width} wide and the stream {d_model}; give LMHead a transform"
            )
        return LMHead(self, d_model, width, embed.vocab_size)


@final
class LMHead(Head):
    """Logits are products with the vectors of the vocabulary, so the head may share them."""

    def __init__(self, config: LMHeadConfig, d_model: int, width: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = None if config.transform is None else config.transform.build(d_model, width)
        self.weight: Table | None = None if config.tied else nn.Parameter(torch.empty(vocab_size, width))
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if config.bias else None
        self.softcap, self.smoothing = config.softcap, config.smoothing

    def flops(self, table: Table | None) -> int:
        weight = self._weight(table)
        n = weight.in_features * weight.out_features if isinstance(weight, Packed) else weight.numel()
        return 2 * n + (0 if self.transform is None else self.transform.flops())

    def pack(self) -> None:
        pack_table(self)

    def _weight(self, table: Table | None) -> Tensor | Packed:
        weight = table if self.weight is None else self.weight
        assert weight is not None
        return weight

    def forward(self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None) -> Float[Tensor, "B T V"]:
        logits = project(x if self.transform is None else self.transform(x), self._weight(table))
        logits = logits if self.bias is None else logits + self.bias
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def loss(
        self, x: Float[Tensor, "B T D"], tokens: Tokens, table: Table | None, targets: Int[Tensor, "B T"], scale: float
    ) -> Float[Tensor, ""]:
        """Cross-entropy in nats, without the logits of all tokens at once."""
        check_targets(targets, tokens.shape)
        targets = torch.where(tokens.valid, targets, IGNORE)
        weight = self._weight(table)
        if isinstance(weight, Packed):
            raise ConfigError("a packed head has no loss; load the model with a dtype such as float32")
        x, targets = x.flatten(0, 1), targets.flatten()
        meant = targets != IGNORE
        if self.transform is not None or 2 * int(meant.sum()) < len(meant):  # nothing is done for many without a target
            x, targets = x[meant], targets[meant]
            x = x if self.transform is None else self.transform(x)
        return linear_cross_entropy(
            x,
            weight.to(x.dtype),
            targets,
            bias=None if self.bias is None else self.bias.to(x.dtype),
            scale=scale,
            softcap=self.softcap,
            smoothing=self.smoothing if self.training else 0.0,
        )

    def count(self, targets: Int[Tensor, "B T"], tokens: Tokens) -> int:
        """How many tokens have a target: those that are no padding and whose target is not -100."""
        check_targets(targets, tokens.shape)
        if targets.is_floating_point():
            raise ConfigError(f"targets are of {targets.dtype} and must be ids such as torch.long")
        return int(((targets != IGNORE) & tokens.valid).sum())
