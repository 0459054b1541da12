"""Models of pairs: a source is read as a whole, and a target written token by token."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qkv.config import config
from qkv.errors import ConfigError
from qkv.models.decoding import Decoding
from qkv.models.model import Model, ModelConfig
from qkv.nn.embedders.token import OPEN_SIZE
from qkv.nn.heads import LMHead
from qkv.nn.sublayer import Aux
from qkv.recorder import Recorder
from qkv.shapes import Float, Int, Tensor
from qkv.tokens import Layout, Tokens


@dataclass(frozen=True)
class Pair:
    """The input of a model of pairs.

    Attributes:
        source: Ids to read.
        tokens: Where they stand. The documents of a source and of a target belong together in their order; a row has
            as many of the one as of the other.
        target: Ids of the target so far, each of which is to predict the next.
    """

    source: Int[Tensor, "B S"]
    tokens: Tokens
    target: Int[Tensor, "B T"]

    def to(self, device: torch.device) -> "Pair":
        """The same on a device."""
        return Pair(self.source.to(device), self.tokens.to(device), self.target.to(device))


@config
class PairModelConfig(ModelConfig, ABC):
    """Base of the configs of models of pairs."""

    @abstractmethod
    def with_vocabularies(self, source: int, target: int, *, shared: bool) -> "PairModelConfig":
        """The same for tokenizers of `source` and `target` tokens; `shared`: they are one.

        Raises:
            ConfigError: A size that is set is too small, or the model needs one tokenizer for both.
        """

    @property
    @abstractmethod
    def vocabularies(self) -> tuple[int | None, int | None]:
        """Tokens of the source and of the target; None: open."""

    def closed(self) -> "PairModelConfig":
        """See `ModelConfig`. Two vocabularies of one size may be one."""
        source, target = self.vocabularies
        sizes = source or target or OPEN_SIZE, target or source or OPEN_SIZE
        return self.with_vocabularies(*sizes, shared=source == target)


def check_pair(inputs: Pair, tokens: Tokens | None) -> Tokens:
    """Where the target's tokens stand, once all that is given fits together.

    Raises:
        ConfigError: Ids and their tokens have different shapes, or a row has not as many sources as targets.
    """
    if tokens is None:
        tokens = Tokens.full(*inputs.target.shape, device=inputs.target.device)
    _check_shape(inputs.source, inputs.tokens, "source")
    _check_shape(inputs.target, tokens, "target")
    here, there = _texts(inputs.tokens), _texts(tokens)
    if len(here) != len(there):
        raise ConfigError(f"there are {len(here)} rows of sources and {len(there)} of targets; give each its own")
    if inputs.tokens.layout is tokens.layout is Layout.FULL or torch.equal(here, there):
        return tokens
    row = int((here != there).nonzero()[0])
    raise ConfigError(
        f"row {row} has {int(here[row])} sources and {int(there[row])} targets; give each target its source"
    )


def check_sources(source: Int[Tensor, "B S"], tokens: Tokens) -> None:
    """Raise unless each row has one source, of at least one token."""
    _check_shape(source, tokens, "source")
    if bool((_texts(tokens) != 1).any()):
        raise ConfigError("each row needs one source with at least one token; leave empty ones out")


def _check_shape(ids: Int[Tensor, "B T"], tokens: Tokens, what: str) -> None:
    if tokens.shape != ids.shape:
        raise ConfigError(f"tokens of the {what} are {tokens.shape} and its ids {tuple(ids.shape)}; make them equal")


def _texts(tokens: Tokens) -> Int[Tensor, " B"]:
    """How many documents each row has."""
    return tokens.segment.amax(1) if tokens.shape[1] else tokens.segment.new_zeros(tokens.shape[0])


class PairModel(Model, ABC):
    """Base of the models of pairs. The head has the target's vocabulary."""

    config: PairModelConfig
    head: LMHead
    blocks = ()
    checkpoint_blocks = False

    @abstractmethod
    def forward(
        self,
        inputs: Pair,
        tokens: Tokens | None = None,
        *,
        targets: Int[Tensor, "B T"] | None = None,
        scale: float | None = None,
        recorder: Recorder | None = None,
    ) -> Float[Tensor, "B T V"] | tuple[Tensor, Aux | None]:
        """The logits of what follows each token of the target.

        Args:
            inputs: Source and target.
            tokens: Where the target's tokens stand; None: one full text per row.
            targets: Given: what `loss` gives, instead of logits.
            scale: As in `loss`.
            recorder: Shown how the target attends to the source.

        Raises:
            ConfigError: Ids and tokens have different shapes, or a row has not as many sources as targets.
        """

    @abstractmethod
    def align(self, inputs: Pair, tokens: Tokens | None = None) -> Float[Tensor, "B T S"]:
        """With which weight each token of the target looked at each of the source when it read it; rows sum to 1.

        Raises:
            ConfigError: The model has no attention, or a row has several texts.
        """

    @abstractmethod
    def start(
        self, source: Int[Tensor, "B S"], tokens: Tokens, prompts: Sequence[Sequence[int]], *, capacity: int
    ) -> Decoding:
        """Read sources, one in each row, and be ready to write their targets.

        Args:
            source: Ids to read.
            tokens: Where they stand.
            prompts: What each target begins with, at least one token.
            capacity: Tokens of the longest target that will be read.
        """
