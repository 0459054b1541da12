"""Texts or pictures with a class each: a model learns which class one is of."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch

from qkv.config import config
from qkv.data import Batches, TokenizerConfig
from qkv.data.dataset import held_out
from qkv.data.labelled import Labelled, LabelledBatches, LabelledFilesConfig, LabelledSourceConfig
from qkv.data.pictures import AugmentationConfig, PictureFoldersConfig, PicturesConfig
from qkv.data.sources import in_files
from qkv.errors import ConfigError, FileError
from qkv.loading.encoder import Encoder
from qkv.loading.facts import Facts
from qkv.loading.reader import Reader
from qkv.loading.ready import tokenizer_in
from qkv.models.model import Model, ModelConfig, evaluating
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.nn.heads import ClassHeadConfig, HeadConfig
from qkv.nn.pooling import MeanPoolConfig
from qkv.tasks.confusion import Confusion
from qkv.tasks.evaluation import Evaluation, Measure, Report, evaluate
from qkv.tasks.reading import PictureReading, Reading, TextReading
from qkv.tasks.task import Asked, Recipe, SampleConfig, Start, Task, TaskConfig, check_same

_LONGEST_NUMBER = 300  # digits of a class that is a number
_USUAL_HEAD = ClassHeadConfig(pool=MeanPoolConfig(), dropout=0.1)


@final
@config
class ClassDataConfig(TaskConfig):
    """Texts or pictures to learn the classes of.

    Held out is `validation` of them, those whose number has the lowest hash.

    Attributes:
        source: The corpus.
        tokenizer: How text becomes ids; None where a recipe's `start` brings its own, and for pictures.
        validation: The share that is held out, above 0 and below 1, or the path of files like those of the source.
        head: What reads the classes out of the stream, in the place of the head of a recipe's `start`. None: the
            model's, if it has one, else the mean over the tokens and a linear layer.
        cut: Whether texts beyond the recipe's context are cut to it, of which special tokens at the end stay; else such
            a text is an error.
        augment: What varies pictures in training, one after the other.
    """

    opens: ClassVar[type] = Encoder

    source: LabelledSourceConfig
    tokenizer: TokenizerConfig | None = None
    validation: float | str | tuple[str, ...] = 0.1
    head: ClassHeadConfig | None = None
    cut: bool = False
    augment: tuple[AugmentationConfig, ...] = ()

    def __post_init__(self) -> None:
        if self.source.holds == "pictures" and (self.tokenizer is not None or self.cut):
            raise ConfigError("data.tokenizer and data.cut are for texts and the source holds pictures; leave them out")
        if self.source.holds == "texts" and self.augment:
            raise ConfigError("data.augment is for pictures and the source holds texts; leave it out")
        if isinstance(self.validation, float | int):
            if not 0 < self.validation < 1:
                raise ConfigError(f"validation={self.validation} must be above 0 and below 1; 0.1 holds out 10 %")
        else:
            in_files(self.source, self.validation)
        if self.head is not None:
            _check_head(self.head, "data.head")

    def check(self, recipe: Recipe) -> None:
        if recipe.sample is not None:
            raise ConfigError("sample writes text and the data are classes; set sample to null")
        if recipe.adapter is not None:
            raise ConfigError("adapter leaves a fresh head as it is drawn; leave adapter out, to train all weights")
        if recipe.model is not None and not isinstance(recipe.model, TransformerConfig):
            raise ConfigError(f"the data are {self.tag()} and model is {recipe.model.tag()}; give a Transformer")
        if recipe.model is not None and recipe.start is None:
            self._check_own(recipe.model)
        if recipe.start is not None and self.tokenizer is not None:
            raise ConfigError("with start the tokenizer is the checkpoint's; leave data.tokenizer out")

    def _check_own(self, model: TransformerConfig) -> None:
        """Refuse a model with a head that gives no classes, or another one than `head`."""
        if model.head is None:
            return
        own = _check_head(model.head, "model.head")
        if self.head is not None and own.replace(n_classes=None) != self.head.replace(n_classes=None):
            raise ConfigError("model.head and data.head are two different heads; leave one of them out")

    def prepare(self, start: Start | None = None) -> "Classes":
        train, out = self._divided()
        labels = _in_order({item.label for item in train})
        if len(labels) < 2:
            found = ", ".join(map(repr, labels)) or "none"
            raise FileError(f"the data: the classes of all {self.source.holds} are {found}; give two classes or more")
        if unknown := sorted({item.label for item in out} - set(labels)):
            raise FileError(
                f"validation: nothing to train on is of the class {unknown[0]!r}; there are {', '.join(labels[:10])}"
            )
        return Classes(self, self._reading(train, out, start), labels, train, out)

    def _reading(self, train: list[Labelled], out: list[Labelled], start: Start | None) -> Reading:
        """How the items are read; a `start` goes on as it was trained."""
        if start is not None:
            return _reading_of(start, self)
        if self.source.holds == "pictures":
            return PictureReading(PicturesConfig.of([each.item for each in train]), self.augment)
        if self.tokenizer is None:
            raise ConfigError("there is no tokenizer; add data.tokenizer, for example BPETokenizer, or a start")
        read = [*train, *out] if self.tokenizer.reads_validation else train
        return TextReading(self.tokenizer.train([each.item for each in read]))

    def _divided(self) -> tuple[list[Labelled], list[Labelled]]:
        """The items to train on and those that are held out."""
        items = list(self.source.items())
        if not isinstance(self.validation, float | int):
            return items, list(in_files(self.source, self.validation).items())
        if len(items) < 2:
            raise FileError(f"the data: {len(items)} {self.source.holds}, of which none can be held out; give more")
        out = held_out(len(items), self.validation)
        return [x for i, x in enumerate(items) if i not in out], [x for i, x in enumerate(items) if i in out]

    @classmethod
    def open(cls, folder: Path, model: Model) -> Encoder:
        assert isinstance(model, Transformer)
        facts = Facts.load(folder)
        if facts is None:
            raise FileError(f"{folder}: has no facts.yaml, which names the classes; put it back, or train again")
        return Encoder(model, tokenizer_in(folder), facts)

    @classmethod
    def evaluate(cls, opened: Any, asked: Asked) -> Report:
        """Loss, accuracy, and the mean over all classes of their F1, with precision and recall of each."""
        asked.refuse("beams", "length_penalty", of="models of pairs")
        asked.refuse("conversations", of="language models")
        start = Start(str(asked.path), opened)
        if asked.data is None:
            if asked.recipe is None:
                raise ConfigError("DATA is missing: give texts or pictures and their classes")
            task = asked.recipe.data.prepare(start)
            check_same(task, asked)
            assert isinstance(task, Classes)
            return task.report(opened.model, asked.recipe.context)
        pictures: PicturesConfig | None = opened.facts.pictures
        if pictures is not None:
            asked.refuse("field", of="models of texts")
            source = PictureFoldersConfig(path=str(asked.data), channels=pictures.channels, size=pictures.size)
        else:
            source = LabelledFilesConfig(
                path=str(asked.data), **({} if asked.field is None else {"field": asked.field})
            )
        labels, items = opened.facts.labels, list(source.items())
        if unknown := sorted({item.label for item in items} - set(labels)):
            raise FileError(f"{asked.data}: the model has no class {unknown[0]!r}; it has {', '.join(labels[:10])}")
        data = cls(source=source, cut=pictures is None)
        return Classes(data, _reading_of(start, data), labels, [], items).report(opened.model, opened.config.limit)


def _check_head(head: HeadConfig, name: str) -> ClassHeadConfig:
    """The head; `ConfigError` where it does not give one class for each item."""
    if not isinstance(head, ClassHeadConfig):
        raise ConfigError(f"{name} is {head.tag()}, which gives no classes; set it to null, or to a ClassHead")
    if head.pool is None:
        raise ConfigError(f"{name} has no pool, and each item has one class; give it one, such as MeanPool")
    return head


def _in_order(labels: set[str]) -> tuple[str, ...]:
    """Sorted; whole numbers by size, and those that are equal as they are written."""
    whole = all(label.removeprefix("-").isdecimal() and len(label) <= _LONGEST_NUMBER for label in labels)
    return tuple(sorted(labels, key=lambda label: (int(label) if whole else 0, label)))


def _reading_of(start: Start, data: ClassDataConfig) -> Reading:
    """How a trained model reads items. Raises `ConfigError` where it reads others than the data hold."""
    reader = start.opened
    if data.source.holds == "pictures":
        if not isinstance(reader, Encoder) or reader.facts.pictures is None:
            raise ConfigError(
                f"start.path={start.path} reads no pictures; start from a model that does, or leave it out"
            )
        return PictureReading(reader.facts.pictures, data.augment)
    if not isinstance(reader, Reader) or reader.tokenizer is None:
        raise ConfigError(f"start.path={start.path} reads no text; start from an encoder or a language model")
    return TextReading(reader.tokenizer)


@final
class Classes(Task):
    """See `ClassDataConfig`.

    Args:
        data: What they were read from.
        reading: How they become what the model reads.
        labels: The names of the classes.
        train: What to train on.
        validation: What is held out.
    """

    def __init__(
        self,
        data: ClassDataConfig,
        reading: Reading,
        labels: Sequence[str],
        train: Sequence[Labelled],
        validation: Sequence[Labelled],
    ) -> None:
        self.data, self.reading, self.labels = data, reading, tuple(labels)
        self._train, self._validation = (
            ([reading.encoded(each.item) for each in part], [self.labels.index(each.label) for each in part])
            for part in (train, validation)
        )
        self._context: int | None = None  # to which a run cuts
        self._found: Confusion | None = None

    @property
    def fingerprint(self) -> str:
        items, labels = self._train
        digest = hashlib.sha256(repr([each.shape for each in items]).encode())
        for each in items:
            digest.update(each.tobytes())
        digest.update(np.array(labels, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def complete(self, model: ModelConfig, recipe: Recipe) -> TransformerConfig:
        assert isinstance(model, TransformerConfig)
        own = model.head if isinstance(model.head, ClassHeadConfig) and recipe.start is None else None
        head = own or self.data.head or _USUAL_HEAD
        if head.n_classes not in (None, len(self.labels)):
            raise ConfigError(f"the head has n_classes={head.n_classes} and the data {len(self.labels)}; leave it out")
        embed = self.reading.fitted(model.embed)
        items = (*self._train[0], *self._validation[0])
        longest = max(len(self.reading.read(each, embed, None).values) for each in items)
        if longest > recipe.context and not self.data.cut:
            raise ConfigError(
                f"context={recipe.context} and the longest {self.reading.item} has {longest} tokens; "
                f"{self.reading.longer}"
            )
        return model.replace(
            embed=embed,
            head=head.replace(n_classes=len(self.labels)),
            context=model.context or recipe.context,
        )

    def batches(self, recipe: Recipe) -> tuple[Batches, Batches]:
        assert isinstance(recipe.model, TransformerConfig)
        self._context = recipe.context
        read = partial(self.reading.read, embed=recipe.model.embed, context=recipe.context)
        sizes: Any = {"context": recipe.context, "batch_size": recipe.batch_size, "seed": recipe.seed}
        return (
            LabelledBatches(*self._train, read, vary=self.reading.varied, shuffle=True, **sizes),
            LabelledBatches(*self._validation, read, shuffle=False, **sizes),
        )

    def save(self, folder: Path) -> None:
        self.reading.save(folder, self.labels)

    def sample(self, model: Model, recipe: Recipe, settings: SampleConfig) -> str:
        """There is none: `ClassDataConfig.check` refuses it."""
        raise AssertionError

    def notes(self, recipe: Recipe) -> Iterator[str]:
        """How many items and classes there are."""
        sizes = len(self._train[0]), len(self._validation[0])
        yield f"{len(self.labels)} classes: {sizes[0]:,} {self.reading.item}s to train on, {sizes[1]:,} held out"

    def measures(self, model: Model, found: Evaluation) -> tuple[Measure, ...]:
        self._found = self._confusion(model, self._context)
        return self._found.measures()

    def pictures(self, folder: Path) -> None:
        if self._found is not None:
            self._found.draw(folder / "confusion.png")

    def next_steps(self, folder: str) -> str:
        return f"qkv classify {folder} {self.reading.example}   ·   qkv eval {folder}   ·   qkv show {folder}"

    def report(self, model: Model, context: int | None) -> Report:
        """How good a model is on what is held out."""
        found = evaluate(model, self._held_out(model, context)).loss
        loss = Measure("loss", found, f"nats per {self.reading.item}", lower_is_better=True)
        confusion = self._confusion(model, context)
        measures = (loss, *confusion.measures(), Measure(f"{self.reading.item}s", len(self._validation[0]), form=","))
        return Report(measures, {"classes": confusion.by_class()}, (*map(str, measures), "", *confusion.lines()))

    def _held_out(self, model: Model, context: int | None) -> Batches:
        assert isinstance(model, Transformer)
        read = partial(self.reading.read, embed=model.config.embed, context=context)
        return LabelledBatches(*self._validation, read, context=context or 1, batch_size=32, seed=0, shuffle=False)

    def _confusion(self, model: Model, context: int | None) -> Confusion:
        """What the model takes the held-out items for."""
        batches, device = self._held_out(model, context), next(model.parameters()).device
        found: list[int] = []
        with evaluating(model), torch.no_grad():
            for i in range(len(batches)):
                batch = batches.batch(0, i).to(device)
                found += model(batch.inputs, batch.tokens).argmax(-1).tolist()
        return Confusion.of(self.labels, np.array(self._validation[1]), np.array(found))
