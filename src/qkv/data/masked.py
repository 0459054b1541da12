"""Tokens to be guessed from those around them: batches that mask some."""

from typing import Any, NamedTuple, final

import numpy as np
import torch

from qkv.data.batches import IGNORE, Batch, Batches, PackedBatches
from qkv.data.dataset import Split
from qkv.data.tokenizer import Tokenizer
from qkv.errors import ConfigError


class Masking(NamedTuple):
    """How tokens are masked. Shares are from 0 to 1.

    Attributes:
        share: Of all tokens, those to be guessed.
        hidden: Of these, those that the mask token replaces.
        random: Of these, those that another token, any, replaces. The rest stay as they are.
    """

    share: float = 0.15
    hidden: float = 0.8
    random: float = 0.1


@final
class MaskedBatches(Batches):
    """The batches of `PackedBatches`, of whose tokens some are masked; these alone are targets.

    Of the tokens of a batch that are neither padding nor special ones, `share` are drawn, at least one. What is drawn
    is a function of seed, epoch and place; in what is held out it does not even depend on the seed.

    Args:
        split: Documents without special tokens. The tokenizer's stand around each piece of one.
        tokenizer: What they were read by; it has a mask token.
        masking: How they are masked.
        sizes: See `Batches`.

    Raises:
        ConfigError: As for `Batches`; or all tokens are special ones.
    """

    def __init__(self, split: Split, tokenizer: Tokenizer, masking: Masking, **sizes: Any) -> None:
        super().__init__(**sizes)
        assert tokenizer.mask is not None
        self._packed = PackedBatches(split, shift=0, frame=tokenizer.frame, **sizes)
        self._masking, self._mask = masking, tokenizer.mask
        self._ordinary = np.ones(tokenizer.vocab_size, dtype=bool)
        self._ordinary[list(tokenizer.special)] = False
        if not self._ordinary[split.values].any():
            raise ConfigError("all tokens of the texts are special ones, such as unknown words; give another tokenizer")

    @property
    def n_rows(self) -> int:
        return self._packed.n_rows

    def rows(self, epoch: int, first: int, end: int) -> Batch:
        whole = self._packed.rows(epoch, first, end)
        random = np.random.default_rng([self.seed if self.shuffle else 0, epoch, first])
        assert isinstance(whole.inputs, torch.Tensor)
        inputs, own = whole.inputs.numpy(), whole.targets.numpy()
        places = np.flatnonzero((own != IGNORE) & self._ordinary[inputs])
        n = min(max(round(self._masking.share * len(places)), 1), len(places))
        chosen, fate = random.choice(places, n, replace=False), random.random(n)
        targets = np.full_like(own, IGNORE)
        targets.flat[chosen] = own.flat[chosen]
        hidden = fate < self._masking.hidden
        other = ~hidden & (fate < self._masking.hidden + self._masking.random)
        inputs.flat[chosen[hidden]] = self._mask
        inputs.flat[chosen[other]] = random.choice(np.flatnonzero(self._ordinary), other.sum())
        return Batch(whole.inputs, torch.from_numpy(targets), whole.tokens)
