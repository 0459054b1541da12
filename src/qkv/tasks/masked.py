"""Texts with masked tokens: a model learns to guess these from both sides, and becomes an encoder."""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import torch

from qkv.config import Share, config
from qkv.data import Batches, Dataset, FilesConfig, SourceConfig, Split, Tokenizer, TokenizerConfig, prepare, with_mask
from qkv.data.batches import IGNORE
from qkv.data.dataset import HeldOut, check_held_out
from qkv.data.masked import MaskedBatches, Masking
from qkv.errors import ConfigError
from qkv.loading.encoder import Encoder
from qkv.loading.facts import Facts
from qkv.loading.ready import tokenizer_in
from qkv.models.model import Model, ModelConfig, evaluating
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.nn.heads import LMHeadConfig, TransformConfig
from qkv.nn.norms import LayerNormConfig
from qkv.tasks.evaluation import Evaluation, Measure, Report, evaluate
from qkv.tasks.task import Asked, Recipe, SampleConfig, Start, Task, TaskConfig
from qkv.tokens import Tokens


@final
@config
class MaskedDataConfig(TaskConfig):
    """Texts, some of whose tokens are to be guessed from all others.

    Documents longer than the context are cut into pieces; the special tokens of the tokenizer, such as `[CLS]` and
    `[SEP]`, stand around each, and are never guessed. In every epoch other tokens are masked; in what is held out,
    always the same ones. A tokenizer without a mask token is given `[MASK]`, and one that puts nothing around texts
    `[CLS]` and `[SEP]`.

    Attributes:
        source: The corpus.
        tokenizer: How text becomes ids; None where a recipe's `start` brings its own.
        validation: As in `DataConfig`.
        share: Of all tokens, those to be guessed.
        hidden: Of these, those that the mask token replaces.
        random: Of these, those that another token, any, replaces. The rest stay as they are.

    Paper: Devlin et al. 2019 (1810.04805), section 3.1.
    """

    opens: ClassVar[type] = Encoder

    source: SourceConfig
    tokenizer: TokenizerConfig | None = None
    validation: HeldOut = 0.05
    share: Share = Masking().share
    hidden: float = Masking().hidden
    random: float = Masking().random

    def __post_init__(self) -> None:
        check_held_out(self.source, self.validation)
        if self.source.holds != "text":
            raise ConfigError(f"the source {self.source.tag()} is {self.source.holds} and masked are texts; give texts")
        if self.share == 0:
            raise ConfigError("share=0 leaves nothing to guess; 0.15 is usual")
        if min(self.hidden, self.random) < 0 or self.hidden + self.random > 1:
            raise ConfigError(
                f"hidden={self.hidden} and random={self.random} are shares of the same tokens; their sum is at most 1"
            )

    @property
    def masking(self) -> Masking:
        """How tokens are masked."""
        return Masking(self.share, self.hidden, self.random)

    def check(self, recipe: Recipe) -> None:
        if recipe.model is not None and not isinstance(recipe.model, TransformerConfig):
            raise ConfigError(f"the data are {self.tag()} and model is {recipe.model.tag()}; give a Transformer")
        if recipe.start is not None and self.tokenizer is not None:
            raise ConfigError("with start the tokenizer is the checkpoint's; leave data.tokenizer out")
        if recipe.start is None and self.tokenizer is None:
            raise ConfigError("there is no tokenizer; add data.tokenizer, for example BPETokenizer, or a start")

    def notes(self) -> Iterable[str]:
        return self.source.notes()

    def prepare(self, start: Start | None = None) -> "Masked":
        if start is None:
            data = prepare(self, bare=True)
            assert data.tokenizer is not None
            return Masked(replace(data, tokenizer=with_mask(data.tokenizer)), self.masking, Facts())
        tokenizer = _tokenizer_of(start.opened, f"start.path={start.path}")
        data = replace(prepare(self, tokenizer, bare=True), tokenizer=tokenizer)  # prepared before, it lacks the mask
        return Masked(data, self.masking, start.opened.facts.replace(labels=()))

    @classmethod
    def open(cls, folder: Path, model: Model) -> Encoder:
        assert isinstance(model, Transformer)
        return Encoder(model, tokenizer_in(folder), Facts.load(folder) or Facts())

    @classmethod
    def measures_a(cls, opened: object) -> bool:
        return (
            super().measures_a(opened) and isinstance(opened, Encoder) and isinstance(opened.config.head, LMHeadConfig)
        )

    @classmethod
    def evaluate(cls, opened: Any, asked: Asked) -> Report:
        if asked.data is None:
            if asked.recipe is None:
                raise ConfigError("DATA is missing: give a text file, a folder of them, or a JSONL file")
            return super().evaluate(opened, asked)
        asked.refuse("beams", "length_penalty", of="models of pairs")
        asked.refuse("conversations", of="language models")
        named = {} if asked.field is None else {"field": asked.field}
        documents = FilesConfig(path=str(asked.data), **named).documents()
        tokenizer = _tokenizer_of(opened, str(asked.path))
        split = Split.from_text(tokenizer, documents, bare=True, of=str(asked.data))
        masking = asked.trained.masking if isinstance(asked.trained, cls) else Masking()
        sizes: Any = {"context": opened.config.limit or 512, "batch_size": 8, "seed": 0, "shuffle": False}
        held_out = MaskedBatches(split, tokenizer, masking, **sizes)
        found = evaluate(opened.model, held_out)
        return cls.report(Masked.unit, found, _measures(opened.model, held_out, found))


def _tokenizer_of(opened: Any, name: str) -> Tokenizer:
    """That of a model to go on with, or to measure."""
    if not isinstance(opened, Encoder) or opened.facts.pictures is not None:
        what = opened.what if not isinstance(opened, Encoder) else "a model of pictures"
        raise ConfigError(f"{name} is {what} and masked tokens are guessed by an encoder of texts; give one")
    if opened.tokenizer is None or opened.tokenizer.mask is None:
        raise ConfigError(f"{name} has no tokenizer with a mask token; name it as 'mask_token' in its folder")
    return opened.tokenizer


@final
class Masked(Task):
    """See `MaskedDataConfig`.

    Args:
        dataset: The documents, without special tokens.
        masking: How tokens are masked.
        facts: What is known of the model.
    """

    unit = "nats per masked token"

    def __init__(self, dataset: Dataset, masking: Masking, facts: Facts) -> None:
        assert dataset.tokenizer is not None
        self.dataset, self.masking, self.facts, self.tokenizer = dataset, masking, facts, dataset.tokenizer
        self._held_out: MaskedBatches | None = None

    @property
    def fingerprint(self) -> str:
        return self.dataset.train.fingerprint

    def complete(self, model: ModelConfig, recipe: Recipe) -> TransformerConfig:
        assert isinstance(model, TransformerConfig)
        if model.mask_ahead is None:
            raise ConfigError(
                "masked tokens are guessed from both sides, and no attention of the model sees what comes after a "
                "token; give its attention the mask Full, or train with other data"
            )
        head = model.head
        if not isinstance(head, LMHeadConfig):
            if recipe.start is None and head is not None:
                raise ConfigError(
                    f"model.head is {head.tag()}, which guesses no tokens; set it to null, or to an LMHead"
                )
            norm = model.embed.norm or model.final_norm or LayerNormConfig()
            bias = isinstance(norm, LayerNormConfig) and norm.bias
            head = LMHeadConfig(bias=True, transform=TransformConfig(norm=norm, bias=bias))
        made = model.replace(
            embed=model.embed.for_vocabulary(self.tokenizer.vocab_size),
            head=head,
            context=model.context or recipe.context,
        )
        if recipe.sample is not None and recipe.sample.prompt:
            assert made.context is not None
            self._check_prompt(recipe.sample.prompt, min(made.context, recipe.context))
        return made

    def _check_prompt(self, prompt: str, room: int) -> None:
        assert self.tokenizer.mask is not None
        (read,) = self.tokenizer.encode_framed([prompt], special=True)
        if self.tokenizer.mask not in read.ids:
            raise ConfigError(f"sample.prompt holds no {self.tokenizer.name_of(self.tokenizer.mask)} to be filled")
        if len(read.ids) > room:
            raise ConfigError(f"sample.prompt has {len(read.ids)} tokens and there is room for {room}; make it shorter")

    def batches(self, recipe: Recipe) -> tuple[Batches, Batches | None]:
        sizes: Any = {"context": recipe.context, "batch_size": recipe.batch_size, "seed": recipe.seed}
        made = partial(MaskedBatches, tokenizer=self.tokenizer, masking=self.masking, **sizes)
        self._held_out = made(self.dataset.validation, shuffle=False) if self.dataset.validation.n_documents else None
        return made(self.dataset.train, shuffle=True), self._held_out

    def save(self, folder: Path) -> None:
        self.tokenizer.save(folder)
        self.facts.save(folder)

    def measures(self, model: Model, found: Evaluation) -> tuple[Measure, ...]:
        assert self._held_out is not None
        return _measures(model, self._held_out, found)

    def sample(self, model: Model, recipe: Recipe, settings: SampleConfig) -> str:
        """The prompt with its masks filled; without one the beginning of what is held out, guesses in brackets."""
        assert isinstance(model, Transformer)
        if settings.prompt:
            return self._filled(model, settings.prompt)
        batches = self._held_out or self.batches(recipe)[0]
        batch = batches.batch(0, 0)
        assert isinstance(batch.inputs, torch.Tensor)
        n = min(int((batch.tokens.segment[0] == 1).sum()), settings.tokens)
        return self._guessed(model, batch.inputs[:1, :n], batch.targets[0, :n].tolist())

    def _filled(self, model: Transformer, prompt: str) -> str:
        assert self.tokenizer.mask is not None
        parts = prompt.split(self.tokenizer.name_of(self.tokenizer.mask))
        with evaluating(model):
            guesses = Encoder(model, self.tokenizer, self.facts).fill(prompt, top=1)
        words = [f"[{guess.label.strip()}]" for (guess,) in guesses]
        return "".join(part + word for part, word in zip(parts, [*words, ""], strict=True))

    def _guessed(self, model: Transformer, inputs: torch.Tensor, targets: list[int]) -> str:
        """A text with the guess for each token that was masked, and where it is another one, the token itself."""
        device = next(model.parameters()).device
        with evaluating(model), torch.no_grad():
            guesses = model(inputs.to(device)).argmax(-1)[0].tolist()
        stream, text = self.tokenizer.stream(), ""
        for token, guess, target in zip(inputs[0].tolist(), guesses, targets, strict=True):
            piece = stream.push(token if target == IGNORE else target)
            if target == IGNORE:
                text += piece
                continue
            word = piece.lstrip()
            wrong = "" if guess == target else f" / {self.tokenizer.text_of(guess).strip()}"
            text += f"{piece[: len(piece) - len(word)]}[{word}{wrong}]"
        return text + stream.flush()

    def next_steps(self, folder: str) -> str:
        assert self.tokenizer.mask is not None
        name = self.tokenizer.name_of(self.tokenizer.mask)
        return f'qkv fill {folder} "Once {name} a time"   ·   qkv embed {folder} "TEXT"   ·   qkv eval {folder}'


def _measures(model: Model, batches: Batches, found: Evaluation) -> tuple[Measure, ...]:
    """Perplexity and accuracy of the masked tokens."""
    assert isinstance(model, Transformer)
    right, device = 0, next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for i in range(len(batches)):
            batch = batches.batch(0, i).to(device)
            assert isinstance(batch.inputs, torch.Tensor)
            stream, _ = model.encode(batch.inputs, batch.tokens)
            meant = batch.targets != IGNORE
            logits = model.readout(stream[meant][None], Tokens.full(1, int(meant.sum()), device=device))
            right += int((logits[0].argmax(-1) == batch.targets[meant]).sum())
    return (
        Measure("perplexity", math.exp(min(found.loss, 700.0)), lower_is_better=True, form=",.2f"),
        Measure("accuracy", right / max(1, found.tokens), lower_is_better=False),
    )
