"""From logits to the next token."""

import random
import secrets
from collections.abc import Iterable, Sequence
from typing import Final, final

import torch

from qkv.config import Config, config
from qkv.errors import ConfigError, QkvError
from qkv.shapes import Float, Int, Tensor

_LEAST: Final = {"repetition_penalty": 1e-6, "temperature": 1e-40, "top_p": 1e-20}
"""Below it the arithmetic of float32, in which tokens are drawn, breaks down."""


@final
@config
class SamplingConfig(Config):
    """How the next token is drawn. The filters act in the order of the fields; the defaults filter nothing.

    Attributes:
        repetition_penalty: θ of Keskar et al. 2019 (CTRL), section 4.1, for every token of the prompt and of what was
            generated. Differs from the paper, as everywhere today: the logit x becomes x / θ only where it is positive,
            and x · θ where it is negative (the paper's x / θ would make those tokens likelier). 1: none.
        temperature: The logits are divided by it. 0: always the most likely token, and the other filters do nothing.
        top_k: Keep the k most likely tokens, and those as likely as the last of them (Fan et al. 2018, section 5.1).
        top_p: Keep the most likely tokens until their probabilities sum to p (Holtzman et al. 2020, section 3.1).
        min_p: Keep the tokens at least p times as likely as the most likely one (Nguyen et al. 2024, section 3).
        seed: Of the random numbers; None: another one each time.
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 is none")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be at least 0; 0 takes the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} must be at least 1; leave it out to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1; leave it out to keep all tokens")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p={self.min_p} must be between 0 and 1; leave it out to keep all tokens")
        for name, least in _LEAST.items():
            if 0 < (getattr(self, name) or 1) < least:
                raise ConfigError(f"{name}={getattr(self, name)} is too small to draw by; give {least} or more")


USUAL: Final = SamplingConfig(temperature=0.8)
"""How tokens are drawn where neither the model nor its user says: a little nearer to the likely ones."""


def row_generators(seed: int | None, rows: Iterable[int], device: torch.device) -> list[torch.Generator]:
    """A source of random numbers for each row, which depends on nothing but (seed, number of the row)."""
    seed = secrets.randbits(63) if seed is None else seed
    # `random.Random` hashes the text, so that neighbouring seeds and rows have nothing in common.
    return [torch.Generator(device).manual_seed(random.Random(f"{seed}/{row}").getrandbits(63)) for row in rows]


def next_ids(
    logits: Float[Tensor, "B V"],
    history: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    generators: Sequence[torch.Generator],
) -> Int[Tensor, " B"]:
    """Draw one token for each row.

    Args:
        logits: Of the next token; the computation is in float32.
        history: The tokens so far, prompt included, for each row.
        sampling: How to draw.
        generators: One for each row, from `row_generators`.
    """
    logits = _penalised(logits.float(), history, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = filtered(logits, sampling).softmax(-1)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn)


def log_probabilities(logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
    """In nats, in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def check_finite(logits: Float[Tensor, "R V"]) -> None:
    """Refuse rows of which nothing can be drawn; one token may be impossible, not all.

    Raises:
        QkvError: A row holds NaN or infinity, or nothing but -infinity.
    """
    if not bool(logits.amax(-1).isfinite().all()):
        raise QkvError(
            "the model's logits are not finite: its weights are damaged, or its type is too narrow; use float32"
        )


def filtered(logits: Float[Tensor, "B V"], sampling: SamplingConfig) -> Float[Tensor, "B V"]:
    """Logits after temperature, top-k, top-p and min-p; -inf where a token is out."""
    # The largest logit is taken off first: nothing else changes, and a tiny temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        values, order = logits.softmax(-1).sort(descending=True, stable=True)
        before = values.cumsum(-1) - values
        out = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, before >= sampling.top_p)
        logits = logits.masked_fill(out, -torch.inf)
    if sampling.min_p is not None:
        probabilities = logits.softmax(-1)
        floor = sampling.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < floor, -torch.inf)
    return logits


def _penalised(logits: Tensor, history: Sequence[Sequence[int]], penalty: float) -> Tensor:
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, ids in enumerate(history):
        seen = torch.tensor(list(set(ids)), device=logits.device)
        found = logits[row, seen]
        logits[row, seen] = torch.where(found > 0, found / penalty, found * penalty)
    return logits
