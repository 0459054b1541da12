"""Token ids to vectors."""

import math
from typing import ClassVar, Final, final

import torch
from torch import nn

from qkv.config import config
from qkv.errors import ConfigError
from qkv.nn.embedders.embedder import Embedder, EmbedderConfig
from qkv.nn.quantised import Table, look_up, pack_table
from qkv.shapes import Float, Int, Tensor

OPEN_SIZE: Final = 256
"""Tokens of a vocabulary that only a tokenizer knows, where a model is built without one."""


@final
@config
class TokenEmbedderConfig(EmbedderConfig):
    """A trained vector for each token of a vocabulary.

    Attributes:
        vocab_size: Tokens in the vocabulary. None: in a recipe, that of the tokenizer.
        scale: What the vectors are multiplied with, rounded to the type of the weights, as in Gemma's code. None: √D
            (Vaswani et al. 2017, section 3.4; Gemma).
    """

    vocab_size: int | None = None
    scale: float | None = 1.0

    takes: ClassVar[str] = "token ids  (T)"

    @property
    def left_open(self) -> str:
        return "set by the tokenizer" if self.vocab_size is None else ""

    def notes(self, d_model: int) -> list[str]:
        size = "…" if self.vocab_size is None else f"{self.vocab_size:,}"
        return [f"a vector for each of {size} tokens, {self.width or d_model:,} wide"]

    def for_vocabulary(self, n: int, of: str = "", name: str = "embed") -> "TokenEmbedderConfig":
        """The same for the tokenizer `of` something, with `n` tokens; a larger table stays. `name` is its own name."""
        if self.vocab_size is not None and self.vocab_size < n:
            raise ConfigError(
                f"the tokenizer{of} has {n} tokens and model.{name}.vocab_size is {self.vocab_size}; leave it out, or "
                f"set it to {n} or more"
            )
        return self.replace(vocab_size=self.vocab_size or n)

    def closed(self) -> "TokenEmbedderConfig":
        """As many as there are bytes."""
        return self if self.vocab_size is not None else self.replace(vocab_size=OPEN_SIZE)


@final
class TokenEmbedder(Embedder, config=TokenEmbedderConfig):
    """One table, which a tied head uses as well."""

    def __init__(self, config: TokenEmbedderConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        if config.vocab_size is None or config.vocab_size < 1:
            raise ConfigError(f"embed.vocab_size={config.vocab_size}; set it to the number of tokens of the tokenizer")
        self.scale = math.sqrt(self.width) if config.scale is None else config.scale
        self.vocab_size = config.vocab_size
        self.weight: Table = nn.Parameter(torch.empty(config.vocab_size, self.width))

    def embed(self, inputs: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """The vector of each id. An id that there is not raises `ConfigError` on CPUs; a GPU stops the process."""
        if inputs.dim() != 2 or inputs.is_floating_point():
            kind = f"{tuple(inputs.shape)} of {inputs.dtype}"
            raise ConfigError(f"token ids are whole numbers, (B, T), and these {kind}; give ids such as torch.long")
        try:
            x = look_up(inputs, self.weight)
        except IndexError:
            raise ConfigError(
                f"ids from {int(inputs.min())} to {int(inputs.max())} do not fit a vocabulary of {self.vocab_size} "
                "tokens; use the model's own tokenizer"
            ) from None
        return x if self.scale == 1 else x * torch.tensor(self.scale, dtype=x.dtype)

    def flops(self) -> int:
        return 0 if self.widen is None else 2 * self.widen.weight.numel()

    def example(self, batch: int, length: int, generator: torch.Generator) -> Int[Tensor, "B T"]:
        return torch.randint(self.vocab_size, (batch, length), generator=generator)

    def pack(self) -> None:
        pack_table(self)

    @property
    def table(self) -> Table:
        return self.weight
