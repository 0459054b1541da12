"""Texts, pictures or series, each with a class, several, or a number: a model learns to say it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, final

import torch

from qkv.config import config
from qkv.data import Batches, TokenizerConfig
from qkv.data.augment import AugmentationConfig
from qkv.data.dataset import held_out
from qkv.data.labelled import Holds, Labelled, LabelledBatches, LabelledFilesConfig, LabelledSourceConfig
from qkv.data.labelled_vectors import LabelledVectorsConfig
from qkv.data.labelled_words import LabelledWordsConfig
from qkv.data.pictures import PictureFoldersConfig
from qkv.data.sources import in_files
from qkv.errors import ConfigError, FileError
from qkv.loading.encoder import Encoder
from qkv.loading.facts import Facts
from qkv.loading.ready import tokenizer_in
from qkv.models.model import Model, ModelConfig
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.nn.embedders import VectorEmbedderConfig
from qkv.nn.heads import ClassHeadConfig, HeadConfig
from qkv.nn.pooling import MeanPoolConfig
from qkv.shapes import Tensor
from qkv.tasks.evaluation import Evaluation, Measure, Report, evaluate
from qkv.tasks.findings import Findings
from qkv.tasks.reading import PictureReading, Reading, TextReading, VectorReading, WordReading
from qkv.tasks.targets import OneClassConfig, TargetsConfig, targets_for
from qkv.tasks.task import Asked, Recipe, SampleConfig, Start, Task, TaskConfig, check_same

_READINGS: Final[dict[Holds, type[Reading]]] = {
    "texts": TextReading,
    "words": WordReading,
    "pictures": PictureReading,
    "vectors": VectorReading,
}
_USUAL_HEAD = ClassHeadConfig(pool=MeanPoolConfig(), dropout=0.1)


@final
@config
class ClassDataConfig(TaskConfig):
    """Texts, pictures or series of vectors to learn the classes of, or numbers.

    Held out is `validation` of them, those whose number has the lowest hash.

    Attributes:
        source: The corpus.
        targets: What each has: a class, several, or a number.
        tokenizer: How text becomes ids; None where a recipe's `start` brings its own, and for others.
        validation: The share that is held out, above 0 and below 1, or the path of files like those of the source.
        head: What reads classes or numbers out of the stream, in the place of the head of a recipe's `start`. None: the
            model's, if it has one, else the mean over the tokens (of words none) and a linear layer.
        cut: Whether texts beyond the recipe's context are cut to it, of which special tokens at the end stay; else such
            a text is an error.
        augment: What varies pictures in training, one after the other.
    """

    opens: ClassVar[type] = Encoder

    source: LabelledSourceConfig
    targets: TargetsConfig = OneClassConfig()
    tokenizer: TokenizerConfig | None = None
    validation: float | str | tuple[str, ...] = 0.1
    head: ClassHeadConfig | None = None
    cut: bool = False
    augment: tuple[AugmentationConfig, ...] = ()

    def __post_init__(self) -> None:
        holds = self.source.holds
        if holds not in ("texts", "words") and self.tokenizer is not None:
            raise ConfigError(f"data.tokenizer is for texts and the source holds {holds}; leave it out")
        if holds != "texts" and self.cut:
            raise ConfigError(f"data.cut is for texts and the source holds {holds}; leave it out")
        if self.targets.of_words != (holds == "words"):
            raise ConfigError(
                f"the source {self.source.tag()} holds {holds} and data.targets are {self.targets.tag()}; the targets "
                "of words, and of nothing else, are WordClasses"
            )
        if holds != "pictures" and self.augment:
            raise ConfigError(f"data.augment is for pictures and the source holds {holds}; leave it out")
        if isinstance(self.validation, float | int):
            if not 0 < self.validation < 1:
                raise ConfigError(f"validation={self.validation} must be above 0 and below 1; 0.1 holds out 10 %")
        else:
            in_files(self.source, self.validation)
        if self.head is not None:
            _check_head(self.head, "data.head", self.targets)

    def check(self, recipe: Recipe) -> None:
        if recipe.sample is not None:
            raise ConfigError("sample writes text and the data are classes; set sample to null")
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
        own = _check_head(model.head, "model.head", self.targets)
        if self.head is not None and own.replace(n_classes=None) != self.head.replace(n_classes=None):
            raise ConfigError("model.head and data.head are two different heads; leave one of them out")

    def prepare(self, start: Start | None = None) -> "Classes":
        train, out = self._divided()
        targets = self.targets.fitted([self.targets.parse(each.label, each.where) for each in train])
        return Classes(self, self._reading(train, out, start), targets, train, out)

    def notes(self) -> Iterable[str]:
        return self.source.notes()

    def _reading(self, train: list[Labelled], out: list[Labelled], start: Start | None) -> Reading:
        """How the items are read; a `start` goes on as it was trained."""
        reading = _READINGS[self.source.holds]
        if start is not None:
            return reading.of(start)
        items, others = ([each.item for each in part] for part in (train, out))
        return reading.fresh(items, others, self.tokenizer)

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
    def measures_a(cls, opened: object) -> bool:
        head = opened.config.head if isinstance(opened, Encoder) else None
        return isinstance(head, ClassHeadConfig) and head.n_classes is not None

    @classmethod
    def evaluate(cls, opened: Any, asked: Asked) -> Report:
        """The loss and what else says how good it is; of classes, precision and recall of each."""
        asked.refuse("beams", "length_penalty", of="models of pairs")
        asked.refuse("conversations", of="language models")
        start = Start(str(asked.path), opened)
        if asked.data is None:
            if asked.recipe is None:
                raise ConfigError("DATA is missing: give texts or pictures and their classes, or numbers")
            task = asked.recipe.data.prepare(start)
            check_same(task, asked)
            assert isinstance(task, Classes)
            return task.report(opened.model, asked.recipe.context)
        trained = asked.trained if isinstance(asked.trained, cls) else None
        source = _source(asked, opened, trained)
        targets = (targets_for(opened.config.head) if trained is None else trained.targets).of_facts(opened.facts)
        data = cls(source=source, targets=targets, cut=source.holds == "texts")
        task = Classes(data, _READINGS[source.holds].of(start), targets, [], list(source.items()))
        return task.report(opened.model, opened.config.limit)


def _source(asked: Asked, opened: Encoder, trained: ClassDataConfig | None) -> LabelledSourceConfig:
    """The DATA that are asked for, read as those that the model was trained on, if they were files of that kind."""
    path, pictures = str(asked.data), opened.facts.pictures
    if pictures is not None:
        asked.refuse("field", of="models of texts")
        return PictureFoldersConfig(path=path, channels=pictures.channels)
    kind = LabelledWordsConfig if opened.gives_tags else LabelledFilesConfig
    kind = LabelledVectorsConfig if isinstance(opened.config.embed, VectorEmbedderConfig) else kind
    known = None if trained is None else trained.source
    source = known.replace(path=path) if isinstance(known, kind) else kind(path=path)
    return source if asked.field is None else source.replace(field=asked.field)


def _check_head(head: HeadConfig | None, name: str, targets: TargetsConfig) -> ClassHeadConfig:
    """The head; `ConfigError` where it does not give what the targets are."""
    if not isinstance(head, ClassHeadConfig):
        found = "none" if head is None else head.tag()
        raise ConfigError(f"{name} is {found}, which gives no classes; set it to null, or to a ClassHead")
    if head.pool is not None and targets.of_words:
        raise ConfigError(f"{name} has a pool, and each word has a class; set head.pool to null")
    if head.pool is None and not targets.of_words:
        raise ConfigError(f"{name} has no pool, and each item has one class; give it one, such as MeanPool")
    return head


@final
class Classes(Task):
    """See `ClassDataConfig`.

    Args:
        data: What they were read from.
        reading: How they become what the model reads.
        targets: What they have, fitted to what is trained on.
        train: What to train on.
        validation: What is held out.
    """

    def __init__(
        self,
        data: ClassDataConfig,
        reading: Reading,
        targets: TargetsConfig,
        train: Sequence[Labelled],
        validation: Sequence[Labelled],
    ) -> None:
        self.data, self.reading, self.targets = data, reading, targets
        self._train, self._validation = map(self._encoded, (train, validation))
        self._found: Findings | None = None

    def _encoded(self, items: Sequence[Labelled]) -> tuple[list[Any], Tensor | list[Tensor]]:
        """Items and targets as numbers."""
        where = [each.where for each in items]
        parsed = [self.targets.parse(each.label, each.where) for each in items]
        encoded = [self.reading.encoded(each.item) for each in items]
        return encoded, self.reading.placed(encoded, self.targets.encoded(parsed, where))

    @property
    def fingerprint(self) -> str:
        items, targets = self._train
        digest = hashlib.sha256(repr([each.shape for each in items]).encode())
        for each in items:
            digest.update(each.tobytes())
        for each in targets if isinstance(targets, list) else [targets]:
            digest.update(each.numpy().tobytes())
        return digest.hexdigest()

    def complete(self, model: ModelConfig, recipe: Recipe) -> TransformerConfig:
        assert isinstance(model, TransformerConfig)
        own = model.head if isinstance(model.head, ClassHeadConfig) and recipe.start is None else None
        head = own or self.data.head or (_USUAL_HEAD.replace(pool=None) if self.targets.of_words else _USUAL_HEAD)
        embed = self.reading.fitted(model.embed)
        items = (*self._train[0], *self._validation[0])
        longest = max(self.reading.length(each, embed, None) for each in items)
        if longest > recipe.context and not self.data.cut:
            raise ConfigError(
                f"context={recipe.context} and the longest {self.reading.item} has {longest} tokens; "
                f"{self.reading.longer}"
            )
        return model.replace(
            embed=embed,
            head=self.targets.head(head),
            context=model.context or recipe.context,
        )

    def batches(self, recipe: Recipe) -> tuple[Batches, Batches]:
        assert isinstance(recipe.model, TransformerConfig)
        reads: Any = {"embed": recipe.model.embed, "context": recipe.context}
        read = partial(self.reading.read, **reads)
        sizes: Any = {"context": recipe.context, "batch_size": recipe.batch_size, "seed": recipe.seed}
        train = LabelledBatches(
            *self._train,
            read,
            lengths=[self.reading.length(each, **reads) for each in self._train[0]],
            augment=self.data.augment,
            n_classes=self.targets.n,
            shuffle=True,
            **sizes,
        )
        return train, LabelledBatches(*self._validation, read, shuffle=False, **sizes)

    def save(self, folder: Path) -> None:
        self.reading.save(folder, self.targets.facts())

    def sample(self, model: Model, recipe: Recipe, settings: SampleConfig) -> str:
        """There is none: `ClassDataConfig.check` refuses it."""
        raise AssertionError

    def notes(self, recipe: Recipe) -> Iterator[str]:
        """How many items there are, and what they have."""
        sizes = len(self._train[0]), len(self._validation[0])
        yield f"{self.targets.note()}: {sizes[0]:,} {self.reading.items} to train on, {sizes[1]:,} held out"

    def evaluate(
        self,
        model: Model,
        batches: Batches,
        *,
        limit: int | None = None,
        goes_on: Callable[[int, int], bool] = lambda *_: True,
    ) -> Evaluation:
        outputs = list[tuple[Tensor, Tensor]]()
        found = evaluate(model, batches, limit=limit, goes_on=goes_on, outputs=outputs)
        made = [(wanted.cpu(), out.flatten(0, -2).cpu()) for wanted, out in outputs]
        wanted = [each.reshape(len(out), *each.shape[1 + self.targets.of_words :]) for each, out in made]
        self._found = self.targets.findings(torch.cat(wanted), torch.cat([out for _, out in made])) if made else None
        return found

    def measures(self, model: Model, found: Evaluation) -> tuple[Measure, ...]:
        return () if self._found is None else self._found.measures()

    def pictures(self, folder: Path) -> None:
        if self._found is not None:
            self._found.save_picture(folder)

    def next_steps(self, folder: str) -> str:
        return f"qkv classify {folder} {self.reading.example}   ·   qkv eval {folder}   ·   qkv show {folder}"

    def report(self, model: Model, context: int | None) -> Report:
        """How good a model is on what is held out."""
        assert isinstance(model, Transformer)
        read = partial(self.reading.read, embed=model.config.embed, context=context)
        sizes: Any = {"context": context or 1, "batch_size": 32, "seed": 0}
        loss = self.evaluate(model, LabelledBatches(*self._validation, read, shuffle=False, **sizes)).loss
        found = self._found
        assert found is not None
        per = "word" if self.targets.of_words else self.reading.item
        measures = (
            Measure("loss", loss, f"{self.targets.unit} per {per}", lower_is_better=True),
            *found.measures(),
            Measure(self.reading.items, len(self._validation[0]), form=","),
        )
        table = found.lines()
        return Report(measures, found.details(), (*map(str, measures), *(["", *table] if table else [])))
