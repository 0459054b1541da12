"""Generation: one token after another, with a cache, for several prompts at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import final

import torch

from qkv.caches import Cache
from qkv.errors import ConfigError, QkvError
from qkv.generation.sampling import SamplingConfig, next_ids, row_generators
from qkv.models.transformer import Transformer
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.heads import LMHeadConfig
from qkv.shapes import Float, Tensor
from qkv.tokens import Tokens


class Finish(Enum):
    """Why a row has ended."""

    STOP = "a stop id was drawn"
    LENGTH = "max_new_tokens were generated"
    CONTEXT = "the model's context is full"


@dataclass(frozen=True)
class Step:
    """One more token for each row.

    Attributes:
        ids: The new token of each row; None where the row has ended. A stop id ends a row and is not handed out.
        finish: Why each row has ended; None where it goes on.
    """

    ids: tuple[int | None, ...]
    finish: tuple[Finish | None, ...]


@final
class Kept:
    """The cache of one text, for the next one that begins alike: what both have in common is not read again.

    Given to `generate`, it holds afterwards what was read. A generation that is broken off in the middle of a step
    leaves nothing behind.
    """

    def __init__(self) -> None:
        self._cache: Cache | None = None
        self._text: Sequence[int] = ()

    def open(self, text: Sequence[int], capacity: int) -> tuple[Cache, int] | None:
        """The cache, and how much of `text` it holds: all but its last token at most. None: it is of no use."""
        cache = self._cache
        if cache is None or cache.capacity < capacity:
            return None
        held = self._text[: cache.bound]
        same = next((i for i, (a, b) in enumerate(zip(held, text[:-1], strict=False)) if a != b), None)
        same = min(len(held), len(text) - 1) if same is None else same
        try:
            cache.rollback(len(held) - same)
        except ConfigError:  # a ring has overwritten what it would go back to
            return None
        return cache, same

    def keep(self, cache: Cache | None, text: Sequence[int]) -> None:
        """Remember that the cache holds the beginning of this text."""
        self._cache, self._text = cache, text


def context_of(model: Transformer) -> int | None:
    """Tokens of the longest text that the model is made for, as far as its config says."""
    limits = [model.config.context, model.config.embed.max_length]
    return min((n for n in limits if n is not None), default=None)


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop_ids: Sequence[int] = (),
    context: int | None = None,
    streams: Sequence[int] | None = None,
    kept: Kept | None = None,
) -> Iterator[Step]:
    """Go on from each prompt, until every row has ended. The rows have no influence on each other.

    Several samples of one prompt: give it several times.

    Args:
        model: A language model with causal masks. It is in evaluation mode while this runs.
        prompts: Token ids; the lengths may differ.
        max_new_tokens: Tokens to generate for each row at most.
        sampling: How tokens are drawn.
        stop_ids: Tokens that end a row.
        context: Tokens of the longest text, prompt included; None: what the model's config says, or no limit.
        streams: For each row, the number of its stream of random numbers: with one seed and one number, two rows draw
            alike. None: 0, 1, 2, …
        kept: A cache to go on with, for a single prompt.

    Raises:
        ConfigError: The model has no vocabulary, or a prompt is empty, fills the context, or holds an unknown id.
        QkvError: (While it runs.) The logits are not finite.
    """
    embed = model.config.embed
    if not (isinstance(model.config.head, LMHeadConfig) and isinstance(embed, TokenEmbedderConfig)):
        raise ConfigError("only a model with an LMHead can generate text; this one has none")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1")
    limits = [context_of(model) if context is None else context, embed.max_length]
    limit = min((n for n in limits if n is not None), default=None)
    assert embed.vocab_size is not None
    if not prompts:
        raise ConfigError("there are no prompts; give at least one")
    for row, prompt in enumerate(prompts):
        _check(row, prompt, limit, embed.vocab_size)
    if kept is not None and len(prompts) != 1:
        raise ConfigError(f"a kept cache is of one text and there are {len(prompts)} prompts; give one")
    numbers = range(len(prompts)) if streams is None else streams
    generators = row_generators(sampling.seed, numbers, next(model.parameters()).device)
    rows = [
        _Row(list(prompt), generator, frozenset(stop_ids), limit)
        for prompt, generator in zip(prompts, generators, strict=True)
    ]
    return _steps(model, rows, max_new_tokens, sampling, kept)


def _check(row: int, prompt: Sequence[int], limit: int | None, vocab_size: int) -> None:
    if not prompt:
        raise ConfigError(f"prompt {row} is empty; begin it with a token, such as the tokenizer's end_of_text")
    if limit is not None and len(prompt) >= limit:
        raise ConfigError(
            f"prompt {row} has {len(prompt)} tokens and the context {limit}; cut it to {limit - 1} or fewer"
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise ConfigError(
            f"prompt {row} has ids from {min(prompt)} to {max(prompt)} and the model's vocabulary {vocab_size} tokens; "
            "use the model's own tokenizer"
        )


@final
@dataclass
class _Row:
    """One text on its way."""

    text: list[int]
    generator: torch.Generator
    stop_ids: frozenset[int]
    limit: int | None
    finish: Finish | None = None

    def take(self, token: int, *, last: bool) -> int | None:
        """Add a token, if the row still goes on; returns it unless it ends the row."""
        if self.finish is not None:
            return None  # it was only computed along with the others
        if token in self.stop_ids:
            self.finish = Finish.STOP
            return None
        self.text.append(token)
        if len(self.text) == self.limit:
            self.finish = Finish.CONTEXT
        elif last:
            self.finish = Finish.LENGTH
        return token


def _steps(
    model: Transformer, rows: list[_Row], max_new_tokens: int, sampling: SamplingConfig, kept: Kept | None
) -> Iterator[Step]:
    batch: dict[int, _Row] = {}
    cache: Cache | None = None
    was_training = model.training
    model.eval()
    try:
        for left in range(max_new_tokens, 0, -1):
            # Inference mode must not be on at a `yield`: it would be on in the caller.
            with torch.inference_mode():
                if cache is None or cache.bound == cache.capacity:
                    # The longest row is at its end; those that go on are read anew, without it.
                    batch = {i: row for i, row in enumerate(rows) if row.finish is None}
                    cache, held = _open(model, list(batch.values()), left, kept)
                    unread = [row.text[held:] for row in batch.values()]
                else:
                    unread = [row.text[-1:] for row in batch.values()]
                if kept is not None:
                    kept.keep(None, ())  # until the step is done
                logits = _read(model, unread, cache)
                if kept is not None:
                    kept.keep(cache, rows[0].text)
                history, generators = zip(*((row.text, row.generator) for row in batch.values()), strict=True)
                drawn = next_ids(logits, history, sampling, generators).tolist()
            ids: list[int | None] = [None] * len(rows)
            for (i, row), token in zip(batch.items(), drawn, strict=True):
                ids[i] = row.take(token, last=left == 1)
            yield Step(tuple(ids), tuple(row.finish for row in rows))
            if all(row.finish for row in rows):
                return
    finally:
        model.train(was_training)


def _open(model: Transformer, rows: list[_Row], left: int, kept: Kept | None) -> tuple[Cache, int]:
    """A cache with room for all that can be read (the last token of a text never is), and the tokens that it holds."""
    longest = max(len(row.text) for row in rows)
    limit = rows[0].limit
    needed = (longest + left if limit is None else min(longest + left, limit)) - 1
    if kept is None:
        return model.make_cache(len(rows), needed), 0
    if (opened := kept.open(rows[0].text, needed)) is not None:
        return opened
    return model.make_cache(1, 2 * needed if limit is None else min(2 * needed, limit - 1)), 0


def _read(model: Transformer, texts: list[list[int]], cache: Cache) -> Float[Tensor, "B V"]:
    """The logits after the last token of each text."""
    device = next(model.parameters()).device
    lengths = [len(text) for text in texts]
    inputs = torch.zeros(len(texts), max(lengths), dtype=torch.long)
    for row, text in enumerate(texts):
        inputs[row, : len(text)] = torch.tensor(text)
    tokens = None if min(lengths) == max(lengths) else Tokens.padded(lengths, device=device)
    x, _ = model.encode(inputs.to(device), tokens, cache=cache)
    last = torch.tensor(lengths, device=device) - 1
    # Only these rows go through the head: (B, V) logits, never (B, T, V).
    logits = model.readout(x[torch.arange(len(texts), device=device), last, None])[:, 0]
    if not logits.isfinite().all():
        raise QkvError(
            "the model's logits are not finite: its weights are damaged, or its type is too narrow; use float32"
        )
    return logits
