"""Token ids to vectors."""

from typing import final

import torch
import torch.nn.functional as F
from torch import nn

from qkv.config import config
from qkv.errors import ConfigError
from qkv.nn.embedders.embedder import Embedder, EmbedderConfig
from qkv.shapes import Float, Int, Tensor


@final
@config
class TokenEmbedderConfig(EmbedderConfig):
    """A trained vector for each token of a vocabulary.

    Attributes:
        vocab_size: Tokens in the vocabulary. None: in a recipe, that of the tokenizer.
    """

    vocab_size: int | None = None

    def build(self, d_model: int) -> "TokenEmbedder":
        """The embedder for a stream of width `d_model`."""
        return TokenEmbedder(self, d_model)


@final
class TokenEmbedder(Embedder):
    """See `TokenEmbedderConfig`."""

    def __init__(self, config: TokenEmbedderConfig, d_model: int) -> None:
        super().__init__(config, d_model)
        if config.vocab_size is None or config.vocab_size < 1:
            raise ConfigError(f"embed.vocab_size={config.vocab_size}; set it to the number of tokens of the tokenizer")
        self.weight = nn.Parameter(torch.empty(config.vocab_size, d_model))

    def embed(self, inputs: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """The vector of each id.

        Raises:
            ConfigError: There is no such id (on CPUs; on a GPU the kernel stops the process).
        """
        try:
            return F.embedding(inputs, self.weight)
        except IndexError:
            raise ConfigError(
                f"ids from {int(inputs.min())} to {int(inputs.max())} do not fit a vocabulary of {len(self.weight)} "
                "tokens; use the model's own tokenizer"
            ) from None

    @property
    def table(self) -> Float[Tensor, "V D"]:
        """The vectors of all tokens."""
        return self.weight
