"""How well a state of a decoder matches what an encoder has read: the scores of the recurrent translators."""

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import nn

from qkv.config import Config, Configured, Count, config
from qkv.errors import ConfigError
from qkv.ops.scores import additive_scores, dot_scores, general_scores
from qkv.shapes import Float, Tensor


class Score(Configured, nn.Module, ABC):
    """Base of the scores. What depends on the memory alone is computed once per sentence, by `keys`."""

    def keys(self, memory: Float[Tensor, "B S M"]) -> Float[Tensor, "B S A"]:
        """What the scores need of the memory: by default itself."""
        return memory

    @abstractmethod
    def forward(self, states: Float[Tensor, "B T D"], keys: Float[Tensor, "B S A"]) -> Float[Tensor, "B T S"]:
        """A number for each state and each place of the memory; not yet normalised."""


@config
class ScoreConfig(Config, ABC):
    """Base of the configs of scores."""

    def build(self, d_state: int, d_memory: int) -> Score:
        """The score of states of width `d_state` and a memory of width `d_memory`."""
        return self._build(d_state, d_memory)


@final
@config
class AdditiveScoreConfig(ScoreConfig):
    """v · tanh(W s + U h).

    Source: Bahdanau et al. 2015, section A.1.2. Luong's "concat", v · tanh(W [s; h]), is the same: the two halves of
    his W are W and U.

    Attributes:
        width: Of W s and U h. None: that of the states.
    """

    width: Count | None = None


@final
class AdditiveScore(Score, config=AdditiveScoreConfig):
    """v · tanh(q + k), with q = W s and k = U h."""

    def __init__(self, config: AdditiveScoreConfig, d_state: int, d_memory: int) -> None:
        super().__init__()
        width = config.width or d_state
        self.q_proj = nn.Linear(d_state, width, bias=False)
        self.k_proj = nn.Linear(d_memory, width, bias=False)
        self.v = nn.Parameter(torch.empty(width).uniform_(-(width**-0.5), width**-0.5))

    def keys(self, memory: Float[Tensor, "B S M"]) -> Float[Tensor, "B S A"]:
        return self.k_proj(memory)

    def forward(self, states: Float[Tensor, "B T D"], keys: Float[Tensor, "B S A"]) -> Float[Tensor, "B T S"]:
        queries = self.q_proj(states)
        return additive_scores(queries, keys.to(queries.dtype), self.v.to(queries.dtype))


@final
@config
class DotScoreConfig(ScoreConfig):
    """s · h, not scaled (Luong et al. 2015, section 3.1)."""


@final
class DotScore(Score, config=DotScoreConfig):
    """s · h."""

    def __init__(self, config: DotScoreConfig, d_state: int, d_memory: int) -> None:
        super().__init__()
        if d_state != d_memory:
            raise ConfigError(
                f"DotScore needs states as wide as the memory, and they are {d_state} and {d_memory} wide; set "
                f"decoder.d_hidden={d_memory}, or use GeneralScore"
            )

    def forward(self, states: Float[Tensor, "B T D"], keys: Float[Tensor, "B S A"]) -> Float[Tensor, "B T S"]:
        return dot_scores(states, keys)


@final
@config
class GeneralScoreConfig(ScoreConfig):
    """s · W h (Luong et al. 2015, section 3.1)."""


@final
class GeneralScore(Score, config=GeneralScoreConfig):
    """s · W h. W goes to the states, of which there are fewer at a time."""

    def __init__(self, config: GeneralScoreConfig, d_state: int, d_memory: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_state, d_memory))

    def forward(self, states: Float[Tensor, "B T D"], keys: Float[Tensor, "B S A"]) -> Float[Tensor, "B T S"]:
        return general_scores(states, keys, self.weight)
