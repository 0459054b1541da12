"""Generation: several prompts at once, by drawing one token after another or by a search."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

from qkv.errors import ConfigError
from qkv.generation.beam import BeamConfig, Hypothesis, beam_search
from qkv.generation.engine import Engine, Finish, Row
from qkv.generation.sampling import SamplingConfig
from qkv.models.decoding import CachedDecoding
from qkv.models.model import evaluating
from qkv.models.transformer import Transformer
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.nn.heads import LMHeadConfig
from qkv.recorder import Recorder


@dataclass(frozen=True)
class Step:
    """One more token for each row.

    Attributes:
        ids: The new token of each row; None where the row has ended. A stop id ends a row and is not handed out.
        finish: Why each row has ended; None where it goes on.
        log_probabilities: Of the token that was drawn, a stop id included, in nats, as the model alone has it; None
            where nothing was drawn, or they were not asked for.
    """

    ids: tuple[int | None, ...]
    finish: tuple[Finish | None, ...]
    log_probabilities: tuple[float | None, ...]


@final
class Kept:
    """What was read of one text, for the next one that begins alike: what both have in common is not read again."""

    def __init__(self) -> None:
        self._decoding: CachedDecoding | None = None
        self._text: Sequence[int] = ()

    def start(
        self,
        model: Transformer,
        text: Sequence[int],
        capacity: int,
        largest: int | None,
        recorder: Recorder | None = None,
    ) -> CachedDecoding:
        """The decoding of a text, as from `Transformer.start`; where it is new it is made twice as large as asked.

        Args:
            model: The same one each time.
            text: Token ids. It may grow afterwards: what was read is the beginning of it.
            capacity: Tokens that will be read at least.
            largest: Tokens that can be read at most.
            recorder: Handed queries, keys and outputs of every attention that is computed anew.
        """
        decoding = self._decoding
        held = 0 if decoding is None else self._rewind(decoding, text)
        if decoding is None or not held or decoding.cache.capacity < capacity:
            capacity = 2 * capacity if largest is None else min(2 * capacity, largest)
            decoding = model.start([text], capacity=capacity, recorder=recorder)
        else:
            decoding.recorder = recorder
            decoding.read([text[held:]])
        self._decoding, self._text = decoding, text
        return decoding

    def _rewind(self, decoding: CachedDecoding, text: Sequence[int]) -> int:
        """Forget what differs from the text; returns how much of it is held, all but its last token at most."""
        held = self._text[: decoding.cache.bound]
        same = next((i for i, (a, b) in enumerate(zip(held, text[:-1], strict=False)) if a != b), None)
        same = min(len(held), len(text) - 1) if same is None else same
        try:
            decoding.cache.rollback(len(held) - same)
        except ConfigError:  # a ring has overwritten what it would go back to, or a step was broken off
            return 0
        return same


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
    recorder: Recorder | None = None,
    log_probabilities: bool = False,
) -> Iterator[Step]:
    """Go on from each prompt, until every row has ended. The rows have no influence on each other.

    Several samples of one prompt: give it several times. Rows that differ in more than their prompts: `Engine`.

    Args:
        model: A language model with causal masks. It is in evaluation mode while this runs.
        prompts: Token ids; the lengths may differ.
        max_new_tokens: Tokens to generate for each row at most.
        sampling: How tokens are drawn.
        stop_ids: Tokens that end a row.
        context: Tokens of the longest text, prompt included; None: what the model's config says, or no limit.
        streams: For each row, the number of its stream of random numbers: with one seed and one number, two rows draw
            alike. None: 0, 1, 2, …
        kept: What was read before, to continue from, for a single prompt.
        recorder: Handed queries, keys and outputs of every attention, at each step.
        log_probabilities: Whether the steps say that of each token.

    Raises:
        ConfigError: The model has no vocabulary, or a prompt is empty, fills the context, or holds an unknown id.
        QkvError: (While it runs.) The logits are not finite.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1")
    limit = check_prompts(model, prompts, context)
    if kept is not None and len(prompts) != 1:
        raise ConfigError(f"a kept cache is of one text and there are {len(prompts)} prompts; give one")
    numbers = range(len(prompts)) if streams is None else streams
    rows = [
        Row(prompt, sampling, max_new_tokens, frozenset(stop_ids), limit, stream)
        for prompt, stream in zip(prompts, numbers, strict=True)
    ]
    capacity = max(row.longest for row in rows) - 1  # the last token of a text is never read

    def start(texts: Sequence[Sequence[int]]) -> CachedDecoding:
        if kept is not None:
            return kept.start(model, texts[0], capacity, None if limit is None else limit - 1, recorder)
        return model.start(texts, capacity=capacity, recorder=recorder)

    return _steps(model, Engine(start, rows, log_probabilities=log_probabilities), rows)


def search(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    beams: BeamConfig,
    stop_ids: Sequence[int] = (),
    ranks: Sequence[int] | None = None,
) -> Iterator[Step]:
    """Go on from each prompt with the best text that a beam search finds; handed out as by `generate`, once found.

    Args:
        model: A language model with causal masks. It is in evaluation mode while this runs.
        prompts: Token ids; the lengths may differ. Equal ones are searched for once.
        beams: How to search. A text also ends where the model's context does.
        stop_ids: Tokens that end a row.
        ranks: Which text each row is: 0 the best, 1 the second, …; None: the best.

    Raises:
        ConfigError: As in `generate`, or a rank is none of the beams.
        QkvError: (While it runs.) The logits are not finite.
    """
    limit, ranks = check_prompts(model, prompts), [0] * len(prompts) if ranks is None else ranks
    if max(ranks) >= beams.beams:
        raise ConfigError(f"{max(ranks) + 1} texts are asked for and beams={beams.beams}; raise beams")
    return _found(model, [tuple(prompt) for prompt in prompts], limit, beams, stop_ids, ranks)


def _found(
    model: Transformer,
    prompts: list[tuple[int, ...]],
    limit: int | None,
    beams: BeamConfig,
    stop_ids: Sequence[int],
    ranks: Sequence[int],
) -> Iterator[Step]:
    once = list(dict.fromkeys(prompts))
    room = [beams.max_new_tokens if limit is None else min(beams.max_new_tokens, limit - len(p)) for p in once]
    with evaluating(model):
        decoding = model.start(once, capacity=max(len(prompt) + n for prompt, n in zip(once, room, strict=True)) - 1)
        texts = beam_search(decoding, end_ids=stop_ids, search=[replace(beams, max_new_tokens=n) for n in room])
    rows: list[list[_Drawn]] = []
    for prompt, rank in zip(prompts, ranks, strict=True):
        best, longest = texts[once.index(prompt)], len(prompt) + room[once.index(prompt)]
        if rank >= len(best):
            raise ConfigError(f"{max(ranks) + 1} texts are asked for and the search found {len(best)}; ask for fewer")
        rows.append(_drawn(best[rank], Finish.CONTEXT if longest == limit else Finish.LENGTH))
    for at in range(max(map(len, rows))):
        now = [row[at] if at < len(row) else (None, row[-1][1], None) for row in rows]
        ids, finish, log_probabilities = zip(*now, strict=True)
        yield Step(ids, finish, log_probabilities)


_Drawn = tuple[int | None, Finish | None, float]  # of one row, as in `Step`


def _drawn(text: Hypothesis, cut: Finish) -> list[_Drawn]:
    """What was drawn for a row, one after the other."""
    ids = (*text.ids, None) if text.ended else text.ids
    finish = [None] * (len(ids) - 1) + [Finish.STOP if text.ended else cut]
    return list(zip(ids, finish, text.log_probabilities, strict=True))


def check_prompts(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    context: int | None = None,
    *,
    more: int = 1,
    what: str = "prompt",
) -> int | None:
    """How many tokens a text of the model can have; None: any.

    Raises:
        ConfigError: It is no language model, or one of `what` cannot be read with room for `more` tokens after it.
    """
    embed = model.config.embed
    if not (isinstance(model.config.head, LMHeadConfig) and isinstance(embed, TokenEmbedderConfig)):
        raise ConfigError("only a model with an LMHead can generate text; this one has none")
    if not prompts:
        raise ConfigError(f"there are no {what}s; give at least one")
    limits = [model.config.limit if context is None else context, embed.max_length]
    limit = min((n for n in limits if n is not None), default=None)
    vocab_size = embed.vocab_size
    assert vocab_size is not None
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"{what} {row} is empty; begin it with a token, such as the tokenizer's end_of_text")
        if limit is not None and len(prompt) > limit - more:
            raise ConfigError(
                f"{what} {row} has {len(prompt)} tokens and the context {limit}; cut it to {limit - more} or fewer"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ConfigError(
                f"{what} {row} has ids from {min(prompt)} to {max(prompt)} and the model's vocabulary {vocab_size} "
                "tokens; use the model's own tokenizer"
            )
    return limit


def _steps(model: Transformer, engine: Engine, rows: list[Row]) -> Iterator[Step]:
    with evaluating(model):
        while engine.rows:
            drawn = engine.step()
            yield Step(
                tuple(row.text[-1] if row in drawn and row.finish is not Finish.STOP else None for row in rows),
                tuple(row.finish for row in rows),
                tuple(row.log_probabilities[-1] if row in drawn and row.log_probabilities else None for row in rows),
            )
