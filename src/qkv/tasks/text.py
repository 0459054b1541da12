"""Texts: a model learns what comes next, and writes."""

import dataclasses
import math
from typing import final

from qkv.data import FilesConfig, Split, Tokenizer
from qkv.errors import ConfigError
from qkv.loading.loaded import Loaded
from qkv.models.model import Model, ModelConfig
from qkv.models.transformer import TransformerConfig
from qkv.tasks.evaluation import Evaluation, Measure, Report
from qkv.tasks.next_token import NextToken, evaluate_split
from qkv.tasks.task import Asked, Recipe, SampleConfig


class OfTokens(NextToken):
    """Base of the tasks whose documents are text, as a tokenizer reads it."""

    unit = "nats per token"

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids."""
        assert self.dataset.tokenizer is not None
        return self.dataset.tokenizer

    def complete(self, model: ModelConfig, recipe: Recipe) -> TransformerConfig:
        made = super().complete(model, recipe)
        if recipe.sample is not None:
            assert made.context is not None
            check_prompt(self.tokenizer, recipe.sample.prompt, min(made.context, recipe.context) - 1)
        return made

    def sized(self, model: TransformerConfig) -> TransformerConfig:
        n, head = self.tokenizer.vocab_size, model.head
        return dataclasses.replace(model, embed=model.embed.for_vocabulary(n), head=head and head.for_vocabulary(n))

    def measures(self, model: Model, found: Evaluation) -> tuple[Measure, ...]:
        n_bytes = self.dataset.validation.n_bytes
        return (bits_per_byte(found, n_bytes),) if n_bytes else ()


@final
class Text(OfTokens):
    """See `DataConfig`."""

    def sample(self, model: Model, recipe: Recipe, settings: SampleConfig) -> str:
        """The prompt, and how it goes on."""
        sampling = settings.sampling(recipe.seed)
        text = self.opened(model).generate(settings.prompt, max_new_tokens=settings.tokens, sampling=sampling)
        return settings.prompt + str(text)

    def next_steps(self, folder: str) -> str:
        return f'qkv generate {folder} "Once"   ·   qkv eval {folder} FILE   ·   qkv show {folder}'


def check_prompt(tokenizer: Tokenizer, prompt: str, room: int) -> None:
    """Refuse the prompt of a sample that has more tokens than there is room for, or that cannot be read."""
    try:
        n = len(tokenizer.encode(prompt))
    except ConfigError as error:
        raise ConfigError(f"sample.prompt: {error}") from None
    if n > room:
        raise ConfigError(f"sample.prompt has {n} tokens and there is room for {room}; make it shorter")


def bits_per_byte(found: Evaluation, n_bytes: int) -> Measure:
    """The loss of a text in a unit that does not depend on the tokenizer."""
    return Measure("bits_per_byte", found.total / math.log(2) / n_bytes, lower_is_better=True)


def evaluate_text(opened: Loaded, split: Split) -> Report:
    """Loss, perplexity and bits per byte of a model on the documents of a split."""
    found = evaluate_split(opened, split)
    assert split.n_bytes is not None
    measures = (
        Measure("loss", found.loss, OfTokens.unit, lower_is_better=True),
        Measure("perplexity", math.exp(min(found.loss, 700.0)), lower_is_better=True, form=",.2f"),
        bits_per_byte(found, split.n_bytes),
        Measure("tokens", found.tokens, form=","),
        Measure("bytes", split.n_bytes, form=","),
    )
    return Report(measures)


def read_texts(opened: Loaded, asked: Asked) -> Split:
    """The texts that an evaluation was asked for."""
    assert opened.tokenizer is not None
    named = {} if asked.field is None else {"field": asked.field}
    begin = opened.facts.begin_id if opened.facts.begins else None
    return Split.from_text(
        opened.tokenizer, FilesConfig(path=str(asked.data), **named).documents(), begin, of=str(asked.data)
    )
