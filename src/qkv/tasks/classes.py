"""Texts with a class each: a model learns which class a text is of."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch

from qkv.config import config
from qkv.data import Batches, Tokenizer, TokenizerConfig
from qkv.data.dataset import held_out
from qkv.data.labelled import Labelled, LabelledBatches, LabelledFilesConfig, LabelledSourceConfig, LabelledSplit
from qkv.data.sources import in_files
from qkv.errors import ConfigError, FileError
from qkv.loading.encoder import Encoder
from qkv.loading.facts import Facts
from qkv.loading.reader import Reader
from qkv.loading.ready import tokenizer_in
from qkv.models.model import Model, ModelConfig, evaluating
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.nn.heads import ClassHeadConfig
from qkv.nn.pooling import MeanPoolConfig
from qkv.tasks.confusion import Confusion
from qkv.tasks.evaluation import Evaluation, Measure, Report, evaluate
from qkv.tasks.task import Asked, Recipe, SampleConfig, Start, Task, TaskConfig, check_same

_EXAMPLE = ClassHeadConfig(pool=MeanPoolConfig(), dropout=0.1)


@final
@config
class ClassDataConfig(TaskConfig):
    """Texts to learn the classes of.

    Held out is `validation` of the texts, those whose number has the lowest hash.

    Attributes:
        source: The corpus.
        tokenizer: How text becomes ids; None where a recipe's `start` brings its own.
        validation: The share that is held out, above 0 and below 1, or the path of files like those of the source.
        head: What reads the classes out of the stream; it takes the place of the head of a recipe's `start`.
        cut: Whether texts beyond the recipe's context are cut to it, of which special tokens at the end stay; else such
            a text is an error.
    """

    opens: ClassVar[type] = Encoder

    source: LabelledSourceConfig
    tokenizer: TokenizerConfig | None = None
    validation: float | str | tuple[str, ...] = 0.1
    head: ClassHeadConfig = _EXAMPLE
    cut: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.validation, float | int):
            if not 0 < self.validation < 1:
                raise ConfigError(f"validation={self.validation} must be above 0 and below 1; 0.1 holds out 10 %")
        else:
            in_files(self.source, self.validation)
        if self.head.pool is None:
            raise ConfigError("data.head has no pool, and each text has one class; give it one, such as MeanPool")

    def check(self, recipe: Recipe) -> None:
        if recipe.sample is not None:
            raise ConfigError("sample writes text and the data are classes of texts; set sample to null")
        if recipe.adapter is not None:
            raise ConfigError("adapter leaves a fresh head as it is drawn; leave adapter out, to train all weights")
        if recipe.model is not None and not isinstance(recipe.model, TransformerConfig):
            raise ConfigError(f"the data are {self.tag()} and model is {recipe.model.tag()}; give a Transformer")
        if recipe.start is not None and self.tokenizer is not None:
            raise ConfigError("with start the tokenizer is the checkpoint's; leave data.tokenizer out")

    def prepare(self, start: Start | None = None) -> "Classes":
        train, out = self._divided()
        labels = _in_order({item.label for item in train})
        if len(labels) < 2:
            found = ", ".join(map(repr, labels)) or "none"
            raise FileError(f"the data: the classes of all texts are {found}; give texts of two classes or more")
        if unknown := sorted({item.label for item in out} - set(labels)):
            raise FileError(
                f"validation: no text to train on is of the class {unknown[0]!r}; there are {', '.join(labels[:10])}"
            )
        if start is None:
            if self.tokenizer is None:
                raise ConfigError("there is no tokenizer; add data.tokenizer, for example BPETokenizer, or a start")
            read = [*train, *out] if self.tokenizer.reads_validation else train
            tokenizer = self.tokenizer.train([item.text for item in read])
        else:
            tokenizer = _tokenizer_of(start)
        return Classes(self, tokenizer, labels, train, out)

    def _divided(self) -> tuple[list[Labelled], list[Labelled]]:
        """The texts to train on and those that are held out."""
        items = list(self.source.items())
        if not isinstance(self.validation, float | int):
            return items, list(in_files(self.source, self.validation).items())
        if len(items) < 2:
            raise FileError(f"the data: {len(items)} texts, of which none can be held out; give more")
        out = held_out(len(items), self.validation)
        return [x for i, x in enumerate(items) if i not in out], [x for i, x in enumerate(items) if i in out]

    @classmethod
    def open(cls, folder: Path, model: Model) -> Encoder:
        assert isinstance(model, Transformer)
        return Encoder(model, tokenizer_in(folder), Facts.load(folder) or Facts())

    @classmethod
    def evaluate(cls, opened: Any, asked: Asked) -> Report:
        """Loss, accuracy, and the mean over all classes of their F1, with precision and recall of each."""
        asked.refuse("beams", "length_penalty", of="models of pairs")
        asked.refuse("conversations", of="language models")
        if asked.data is None:
            if asked.recipe is None:
                raise ConfigError("DATA is missing: give a .csv, .jsonl or .json file of texts and their classes")
            task = asked.recipe.data.prepare(Start(str(asked.path), opened))
            check_same(task, asked)
            assert isinstance(task, Classes)
            return task.report(opened.model, asked.recipe.context)
        source = LabelledFilesConfig(path=str(asked.data), **({} if asked.field is None else {"field": asked.field}))
        labels, items = opened.facts.labels, list(source.items())
        if unknown := sorted({item.label for item in items} - set(labels)):
            raise FileError(f"{asked.data}: the model has no class {unknown[0]!r}; it has {', '.join(labels[:10])}")
        data = cls(source=source, cut=True)
        return Classes(data, _tokenizer_of(Start(str(asked.path), opened)), labels, [], items).report(
            opened.model, opened.config.limit
        )


def _in_order(labels: set[str]) -> tuple[str, ...]:
    """Sorted; whole numbers by size."""
    whole = all(label.removeprefix("-").isdecimal() for label in labels)
    return tuple(sorted(labels, key=int if whole else str))


def _tokenizer_of(start: Start) -> Tokenizer:
    reader = start.opened
    if not isinstance(reader, Reader) or reader.tokenizer is None:
        raise ConfigError(f"start.path={start.path} reads no text; start from an encoder or a language model")
    return reader.tokenizer


@final
class Classes(Task):
    """See `ClassDataConfig`.

    Args:
        data: How the texts are read.
        tokenizer: Of the model.
        labels: The names of the classes.
        train: What to train on.
        validation: What is held out.
    """

    def __init__(
        self,
        data: ClassDataConfig,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        train: Sequence[Labelled],
        validation: Sequence[Labelled],
    ) -> None:
        self.data, self.tokenizer, self.labels = data, tokenizer, tuple(labels)
        self._train, self._validation = ([self._encoded(item) for item in part] for part in (train, validation))
        self._found: Confusion | None = None

    def _encoded(self, item: Labelled) -> tuple[list[int], int]:
        (framed,) = self.tokenizer.encode_framed([item.text])
        return framed.ids, self.labels.index(item.label)

    @property
    def fingerprint(self) -> str:
        return self._split(self._train, None).fingerprint

    def complete(self, model: ModelConfig, recipe: Recipe) -> TransformerConfig:
        assert isinstance(model, TransformerConfig)
        head = model.head if isinstance(model.head, ClassHeadConfig) and recipe.start is None else self.data.head
        if head.n_classes not in (None, len(self.labels)):
            raise ConfigError(f"the head has n_classes={head.n_classes} and the data {len(self.labels)}; leave it out")
        longest = max(len(ids) for ids, _ in (*self._train, *self._validation))
        if longest > recipe.context and not self.data.cut:
            raise ConfigError(
                f"context={recipe.context} and the longest text has {longest} tokens; raise context, or set data.cut "
                "to cut such texts"
            )
        embed = model.embed.for_vocabulary(self.tokenizer.vocab_size)
        return model.replace(
            embed=embed,
            head=head.replace(n_classes=len(self.labels)),
            context=model.context or recipe.context,
        )

    def batches(self, recipe: Recipe) -> tuple[Batches, Batches]:
        sizes = {"context": recipe.context, "batch_size": recipe.batch_size, "seed": recipe.seed}
        return (
            LabelledBatches(self._split(self._train, recipe.context), shuffle=True, **sizes),
            LabelledBatches(self._split(self._validation, recipe.context), shuffle=False, **sizes),
        )

    def _split(self, items: Sequence[tuple[list[int], int]], context: int | None) -> LabelledSplit:
        end = len(self.tokenizer.prefix) // 2  # special tokens behind a text
        cut = [_cut(ids, context, end) for ids, _ in items]
        return LabelledSplit.of(cut, [label for _, label in items])

    def save(self, folder: Path) -> None:
        self.tokenizer.save(folder)
        Facts(labels=self.labels).save(folder)

    def sample(self, model: Model, recipe: Recipe, settings: SampleConfig) -> str:
        """There is none: `ClassDataConfig.check` refuses it."""
        raise AssertionError

    def notes(self, recipe: Recipe) -> Iterator[str]:
        """How many texts and classes there are."""
        sizes = len(self._train), len(self._validation)
        yield f"{len(self.labels)} classes: {sizes[0]:,} texts to train on, {sizes[1]:,} held out"

    def measures(self, model: Model, found: Evaluation) -> tuple[Measure, ...]:
        self._found = self._confusion(model, None)
        return self._found.measures()

    def pictures(self, folder: Path) -> None:
        if self._found is not None:
            self._found.draw(folder / "confusion.png")

    def next_steps(self, folder: str) -> str:
        return f'qkv classify {folder} "TEXT"   ·   qkv eval {folder}   ·   qkv show {folder}'

    def report(self, model: Model, context: int | None) -> Report:
        """How good a model is on what is held out."""
        split = self._split(self._validation, context)
        batches = LabelledBatches(split, context=context or 1, batch_size=32, seed=0, shuffle=False)
        loss = Measure("loss", evaluate(model, batches).loss, "nats per text", lower_is_better=True)
        confusion = self._confusion(model, context)
        measures = (loss, *confusion.measures(), Measure("texts", split.n_documents, form=","))
        return Report(measures, {"classes": confusion.by_class()}, (*map(str, measures), "", *confusion.lines()))

    def _confusion(self, model: Model, context: int | None) -> Confusion:
        """What the model takes the held-out texts for."""
        split, device = self._split(self._validation, context), next(model.parameters()).device
        batches = LabelledBatches(split, context=context or 1, batch_size=32, seed=0, shuffle=False)
        found: list[int] = []
        with evaluating(model), torch.no_grad():
            for i in range(len(batches)):
                batch = batches.batch(0, i).to(device)
                found += model(batch.inputs, batch.tokens).argmax(-1).tolist()
        return Confusion.of(self.labels, split.labels, np.array(found))


def _cut(ids: list[int], context: int | None, end: int) -> list[int]:
    if context is None or len(ids) <= context:
        return ids
    return [*ids[: context - end], *ids[len(ids) - end :]]
