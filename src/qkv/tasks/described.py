"""Pictures and texts that describe them: a model of two towers learns which belong together."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch

from qkv.config import Share, config
from qkv.data import Batches, TokenizerConfig
from qkv.data.augment import PictureAugmentationConfig
from qkv.data.dataset import held_out
from qkv.data.described import Described, DescribedBatches, DescribedSourceConfig
from qkv.data.pictures import PicturesConfig
from qkv.errors import ConfigError, FileError
from qkv.loading.facts import Facts
from qkv.loading.matcher import Matcher
from qkv.loading.ready import tokenizer_in
from qkv.models.model import Model, ModelConfig, evaluating
from qkv.models.two_towers import Captioned, TwoTowers, TwoTowersConfig, embedded
from qkv.shapes import Bool, Float, Tensor
from qkv.tasks.evaluation import Evaluation, Measure
from qkv.tasks.reading import PictureReading, TextReading
from qkv.tasks.task import Recipe, SampleConfig, Start, Task, TaskConfig

_Item = tuple[np.ndarray, list[np.ndarray]]


@final
@config
class DescribedDataConfig(TaskConfig):
    """Pictures with texts to train two towers on.

    The first text of a picture says what it shows. Held out is `validation` of these texts, those whose number has the
    lowest hash, with all of their pictures, so that nothing that is measured on was trained on.

    Attributes:
        source: The corpus.
        tokenizer: How text becomes ids; None where a recipe's `start` brings its own.
        validation: The share of what is shown that is held out, above 0.
        validation_source: Another corpus, whose pictures of what is held out are measured on. None: those of `source`.
        cut: Whether texts beyond the recipe's context are cut to it; else such a text is an error.
        augment: What varies pictures in training, one after the other.
    """

    opens: ClassVar[type] = Matcher

    source: DescribedSourceConfig
    tokenizer: TokenizerConfig | None = None
    validation: Share = 0.1
    validation_source: DescribedSourceConfig | None = None
    cut: bool = False
    augment: tuple[PictureAugmentationConfig, ...] = ()

    def __post_init__(self) -> None:
        if not self.validation:
            raise ConfigError("validation=0 holds out nothing to measure on; 0.1 holds out 10 % of what is shown")

    def check(self, recipe: Recipe) -> None:
        if recipe.sample is not None:
            raise ConfigError("sample writes text and the data are pictures; set sample to null")
        if recipe.adapter is not None:
            raise ConfigError("adapter is for language models and the data are pictures; leave adapter out")
        if recipe.model is not None and not isinstance(recipe.model, TwoTowersConfig):
            raise ConfigError(f"the data are {self.tag()} and model is {recipe.model.tag()}; give TwoTowers")
        if recipe.start is not None and self.tokenizer is not None:
            raise ConfigError("with start the tokenizer is the checkpoint's; leave data.tokenizer out")

    def prepare(self, start: Start | None = None) -> "DescribedPictures":
        items = list(self.source.items())
        names = list(dict.fromkeys(item.texts[0] for item in items))
        if len(names) < 3:
            raise FileError(f"the data: {len(names)} first texts, of which some are held out; give 3 or more")
        numbers = held_out(len(names), self.validation)
        out = {name for i, name in enumerate(names) if i in numbers}
        train = [item for item in items if item.texts[0] not in out]
        others = items if self.validation_source is None else self.validation_source.items()
        validation = [item for item in others if item.texts[0] in out]
        if not validation:
            raise FileError("the validation_source shows nothing of what is held out; give one that shows the same")
        text, picture = self._readings(train, validation, start)
        return DescribedPictures(self, text, picture, train, validation)

    def _readings(
        self, train: Sequence[Described], out: Sequence[Described], start: Start | None
    ) -> tuple[TextReading, PictureReading]:
        """How texts and pictures are read; a `start` goes on as it was trained."""
        if start is not None:
            base = start.opened
            if not isinstance(base, Matcher) or base.tokenizer is None or base.facts.pictures is None:
                raise ConfigError(f"start.path={start.path} reads no texts and pictures; start from a model of both")
            if base.facts.fill is not None:
                raise ConfigError(f"start.path={start.path} fills texts up, which training does not; begin afresh")
            return TextReading(base.tokenizer), PictureReading(base.facts.pictures)
        texts, others = ([text for item in part for text in item.texts] for part in (train, out))
        pictures = PicturesConfig.of([item.picture for item in train])
        return TextReading.fresh(texts, others, self.tokenizer), PictureReading(pictures)

    @classmethod
    def open(cls, folder: Path, model: Model) -> Matcher:
        assert isinstance(model, TwoTowers)
        facts = Facts.load(folder)
        if facts is None:
            raise FileError(f"{folder}: has no facts.yaml, which says how pictures are read; put it back")
        return Matcher(model, tokenizer_in(folder), facts)


@final
class DescribedPictures(Task):
    """See `DescribedDataConfig`.

    Args:
        data: What they were read from.
        text: How texts become what the model reads.
        picture: How pictures do.
        train: What to train on.
        validation: What is held out.
    """

    unit: ClassVar[str] = "nats per pair"

    def __init__(
        self,
        data: DescribedDataConfig,
        text: TextReading,
        picture: PictureReading,
        train: Sequence[Described],
        validation: Sequence[Described],
    ) -> None:
        self.data, self.text, self.picture = data, text, picture
        self._train = [self._encoded(item, item.texts) for item in train]
        self._validation = [self._encoded(item, item.texts[:1]) for item in validation]
        self._context: int | None = None

    def _encoded(self, item: Described, texts: Sequence[str]) -> _Item:
        return item.picture, [self.text.encoded(text) for text in texts]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for picture, texts in self._train:
            digest.update(repr((picture.shape, [text.tolist() for text in texts])).encode())
            digest.update(picture.tobytes())
        return digest.hexdigest()

    def complete(self, model: ModelConfig, recipe: Recipe) -> TwoTowersConfig:
        assert isinstance(model, TwoTowersConfig)
        longest = max(len(text) for _, texts in (*self._train, *self._validation) for text in texts)
        if longest > recipe.context and not self.data.cut:
            raise ConfigError(f"context={recipe.context} and the longest text has {longest} tokens; {self.text.longer}")
        fitted = model.fitted(self.text.tokenizer.vocab_size, self.picture.pictures.channels)
        return fitted.replace(text=fitted.text.replace(context=fitted.text.context or recipe.context))

    def batches(self, recipe: Recipe) -> tuple[Batches, Batches]:
        assert isinstance(recipe.model, TwoTowersConfig)
        self._context = recipe.context
        sizes: Any = {"context": recipe.context, "batch_size": recipe.batch_size, "seed": recipe.seed}
        return (
            self._batches(recipe.model, self._train, shuffle=True, **sizes),
            self._batches(recipe.model, self._validation, shuffle=False, **sizes),
        )

    def _batches(self, model: TwoTowersConfig, items: list[_Item], **settings: Any) -> Batches:
        of_picture = partial(self.picture.read, embed=model.picture.embed, context=None)
        of_text = partial(self.text.read, embed=model.text.embed, context=settings["context"])
        return DescribedBatches(items, of_picture, of_text, self.data.augment, **settings)

    def save(self, folder: Path) -> None:
        self.text.tokenizer.save(folder)
        Facts(pictures=self.picture.pictures).save(folder)

    def sample(self, model: Model, recipe: Recipe, settings: SampleConfig) -> str:
        """There is none: `DescribedDataConfig.check` refuses it."""
        raise AssertionError

    def notes(self, recipe: Recipe) -> Iterator[str]:
        """How many pictures there are."""
        yield f"{len(self._train):,} pictures to train on, {len(self._validation):,} held out"

    def measures(self, model: Model, found: Evaluation) -> tuple[Measure, ...]:
        """Recall both ways, over all that is held out."""
        assert isinstance(model, TwoTowers)
        batches = self._batches(
            model.config, self._validation, context=self._context or 1, batch_size=64, seed=0, shuffle=False
        )
        device, seen, read, shown = next(model.parameters()).device, [], [], []
        with evaluating(model), torch.no_grad():
            for i in range(len(batches)):
                batch = batches.batch(0, i).to(device)
                assert isinstance(batch.inputs, Captioned)
                seen.append(embedded(model.picture, batch.inputs.pictures, batch.tokens)[0])
                read.append(embedded(model.text, batch.inputs.texts, batch.inputs.tokens)[0])
                shown.append(batch.targets[:, 0])
        likeness, number = torch.cat(seen) @ torch.cat(read).T, torch.cat(shown)
        together = number[:, None] == number
        return tuple(
            Measure(f"{name}_r{k}", recall(rows, right, k), lower_is_better=False, form=".1%")
            for name, rows, right in (
                ("text_of_picture", likeness, together),
                ("picture_of_text", likeness.T, together.T),
            )
            for k in (1, 5)
        )

    def next_steps(self, folder: str) -> str:
        return f"qkv classify {folder} PICTURE.png --labels cat,dog   ·   qkv eval {folder}   ·   qkv show {folder}"


def recall(likeness: Float[Tensor, "Q N"], right: Bool[Tensor, "Q N"], k: int) -> float:
    """The share of rows of which something right is among the `k` that are most alike; a tie counts against it."""
    best = likeness.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    before = (likeness.masked_fill(right, -torch.inf) >= best).sum(1)
    return (before < k).double().mean().item()
