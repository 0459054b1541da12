"""Pairs of texts: a model reads one and learns to write the other."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Final, final

from qkv.config import config
from qkv.data import (
    Batches,
    PairBatches,
    PairSourceConfig,
    PairSplit,
    PairTokenizer,
    Tokenizer,
    TokenizerConfig,
    TSVConfig,
    encode_pairs,
)
from qkv.data.dataset import held_out
from qkv.data.pairs import TextPair
from qkv.data.sources import in_files
from qkv.errors import ConfigError, FileError
from qkv.generation import BeamConfig
from qkv.loading.facts import Facts
from qkv.loading.translator import Translator
from qkv.models.model import Model, ModelConfig, evaluating
from qkv.models.pairs import PairModel, PairModelConfig
from qkv.tasks.evaluation import Measure, Report
from qkv.tasks.task import Asked, Recipe, SampleConfig, Start, Task, TaskConfig, check_same
from qkv.tasks.text import check_prompt

LENGTHS: Final = ((1, 5), (6, 10), (11, 20), (21, 40), (41, None))
"""Tokens of a source, in ranges for which the numbers are given apart."""


@final
@config
class PairDataConfig(TaskConfig):
    """Pairs to train on.

    Held out is `validation` of the pairs, those whose number has the lowest hash; of pairs with equal sources all but
    the first are left out, and those whose source a file of `validation` has, so that nothing that is held out is
    trained on.

    Attributes:
        source: The corpus.
        tokenizer: How sources become ids; None where a recipe's `start` brings its own.
        target_tokenizer: How targets do. None: one tokenizer for both, made from both.
        validation: The share that is held out, above 0 and below 1, or the path of a file like that of the source.
        longest: Pairs with more tokens on one side are left out. None: there must be none beyond the recipe's context.
    """

    opens: ClassVar[type] = Translator
    keeps_start: ClassVar[bool] = True

    source: PairSourceConfig
    tokenizer: TokenizerConfig | None = None
    target_tokenizer: TokenizerConfig | None = None
    validation: float | str = 0.05
    longest: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.validation, str):
            in_files(self.source, self.validation)
        elif not 0 < self.validation < 1:
            raise ConfigError(
                f"validation={self.validation} must be above 0 and below 1, for a translator is measured on what it "
                "held out; 0.05 holds out 5 %, and a path takes the pairs of a file"
            )
        if self.longest is not None and self.longest < 1:
            raise ConfigError(f"longest={self.longest} must be at least 1")
        if self.tokenizer is None and self.target_tokenizer is not None:
            raise ConfigError("target_tokenizer is set and tokenizer is not; give both, or with start leave both out")

    def check(self, recipe: Recipe) -> None:
        if recipe.adapter is not None:
            raise ConfigError("adapter is for language models and the data are pairs; leave adapter out")
        if recipe.model is not None and not isinstance(recipe.model, PairModelConfig):
            raise ConfigError(
                f"the data are {self.tag()} and model is {recipe.model.tag()}; give a model of pairs, such as "
                "bahdanau, or other data"
            )
        if recipe.sample is not None and recipe.sample.temperature != SampleConfig.temperature:
            raise ConfigError("sample.temperature is for language models: a translation is not drawn; leave it out")
        if recipe.start is not None and self.tokenizer is not None:
            raise ConfigError("with start the tokenizer is the checkpoint's; leave data.tokenizer out")

    def divided(self) -> tuple[list[TextPair], list[TextPair]]:
        """The pairs to train on and those that are held out."""
        pairs = _first(self.source)
        if isinstance(self.validation, str):
            out = _first(in_files(self.source, self.validation))
            known = {source for source, _ in out}
            train = [pair for pair in pairs if pair[0] not in known]
            if not (train and out):
                raise FileError(
                    f"{self.validation}: has {len(out)} sources, and {len(train)} are left to train on; give a file "
                    "of other pairs"
                )
            return train, out
        if len(pairs) < 2:
            where = self.source.path if isinstance(self.source, TSVConfig) else f"the corpus {self.source.tag()}"
            raise FileError(f"{where}: has {len(pairs)} different sources; it takes at least 2 to hold one out")
        out = held_out(len(pairs), self.validation)
        return [p for i, p in enumerate(pairs) if i not in out], [p for i, p in enumerate(pairs) if i in out]

    def prepare(self, start: Start | None = None) -> "Pairs":
        train, out = self.divided()
        tokenizer = self._tokenizers(train, out) if start is None else _tokenizers_of(start)
        split, _ = encode_pairs(tokenizer, train, self.longest)
        validation, texts = encode_pairs(tokenizer, out, self.longest)
        return Pairs(split, validation, tokenizer, texts)

    def _tokenizers(self, train: list[TextPair], out: list[TextPair]) -> PairTokenizer:
        if self.tokenizer is None:
            raise ConfigError(
                "the data are pairs and there is no tokenizer; add data.tokenizer, for example BPETokenizer"
            )

        def made(how: TokenizerConfig, sides: tuple[int, ...]) -> Tokenizer:
            pairs = chain(train, out) if how.reads_validation else iter(train)
            return how.train([pair[side] for pair in pairs for side in sides])

        if self.target_tokenizer is None:
            both = made(self.tokenizer, (0, 1))
            return PairTokenizer(both, both)
        return PairTokenizer(made(self.tokenizer, (0,)), made(self.target_tokenizer, (1,)))

    @classmethod
    def open(cls, folder: Path, model: Model) -> Translator:
        assert isinstance(model, PairModel)
        return Translator.read(model, folder)

    @classmethod
    def evaluate(cls, opened: Any, asked: Asked) -> Report:
        """Exact matches, token error rate, BLEU and chrF, and all that by the length of the source.

        An edit is a token of the target that was put in, taken out or changed: characters, phonemes or what the
        tokenizer makes; one that it does not know is an edit. BLEU and chrF (0 to 100) need sacrebleu.
        """
        asked.refuse("conversations", "field", of="language models")
        pairs = _held_out(opened, asked) if asked.data is None else list(TSVConfig(path=str(asked.data)).pairs())
        if not pairs:
            raise FileError(f"{asked.data}: holds no pair; give a file with a source, a tab and a target in each line")
        search = BeamConfig(beams=asked.beams, length_penalty=asked.length_penalty, max_new_tokens=200)
        return _report(opened, pairs, search)


def _first(source: PairSourceConfig) -> list[TextPair]:
    """Of pairs with equal sources the first."""
    first: dict[str, str] = {}
    for text, target in source.pairs():
        first.setdefault(text, target)
    return list(first.items())


@final
@dataclass(frozen=True, eq=False)
class Pairs(Task):
    """Pairs as ids.

    Attributes:
        train: What to train on.
        validation: What was held out.
        tokenizer: Of both sides.
        held_out: The pairs of `validation` as text.
    """

    train: PairSplit
    validation: PairSplit
    tokenizer: PairTokenizer
    held_out: list[TextPair]

    @property
    def fingerprint(self) -> str:
        return self.train.fingerprint

    def complete(self, model: ModelConfig, recipe: Recipe) -> PairModelConfig:
        assert isinstance(model, PairModelConfig)
        source, target = self.tokenizer.source, self.tokenizer.target
        made = model.with_vocabularies(source.vocab_size, target.vocab_size, shared=self.tokenizer.shared)
        if recipe.sample is not None and recipe.sample.prompt:
            check_prompt(source, recipe.sample.prompt, recipe.context)
        return made

    def batches(self, recipe: Recipe) -> tuple[Batches, Batches]:
        sizes = {"context": recipe.context, "batch_size": recipe.batch_size, "seed": recipe.seed}
        return PairBatches(self.train, shuffle=True, **sizes), PairBatches(self.validation, shuffle=False, **sizes)

    def save(self, folder: Path) -> None:
        self.tokenizer.save(folder)

    def sample(self, model: Model, recipe: Recipe, settings: SampleConfig) -> str:
        """What the model makes of the prompt, or of the first pairs that were held out."""
        assert isinstance(model, PairModel)
        source, target = self.tokenizer.source, self.tokenizer.target
        translator = Translator(model, source, target, Facts.of_pairs(target, recipe.context))
        texts = [settings.prompt] if settings.prompt else [source for source, _ in self.held_out[:3]]
        with evaluating(model):
            found = translator.translations(texts, search=BeamConfig(max_new_tokens=settings.tokens))
        return "\n".join(f"{text} → {best[0].text}" for text, best in zip(texts, found, strict=True))

    def notes(self, recipe: Recipe) -> Iterator[str]:
        """How many pairs there are."""
        sizes = self.train.n_documents, self.validation.n_documents
        yield f"{sizes[0]:,} pairs to train on, {sizes[1]:,} held out; of pairs with the same source, the first is used"

    def next_steps(self, folder: str) -> str:
        return f"qkv translate {folder} TEXT   ·   qkv eval {folder}   ·   qkv inspect {folder} TEXT"


def _tokenizers_of(start: Start) -> PairTokenizer:
    base = start.opened
    if not isinstance(base, Translator):
        raise ConfigError(f"start.path={start.path} is no model of pairs; start from one, or give other data")
    if base.begin_id != base.end_id:
        raise ConfigError(
            f"start.path={start.path}: its targets begin with another token than they end with, and training begins "
            "and ends them with one; start from a run of qkv train"
        )
    return PairTokenizer.of(base.source, base.target)


# --- evaluation -------------------------------------------------------------------------------------------------------


def _held_out(opened: Translator, asked: Asked) -> list[TextPair]:
    if asked.recipe is None:
        raise ConfigError(
            f"{asked.path}: is no run and held out nothing; give DATA, a file with a source, a tab and a target a line"
        )
    task = asked.recipe.data.prepare(Start(str(asked.path), opened))
    assert isinstance(task, Pairs)
    check_same(task, asked)
    return task.held_out


def _report(translator: Translator, pairs: list[TextPair], search: BeamConfig) -> Report:
    found = translator.translations([source for source, _ in pairs], search=search)
    texts, references = [best[0].text for best in found], [target for _, target in pairs]
    units = translator.target.units(references)
    edits = [edit_distance(a, b) for a, b in zip(translator.target.units(texts), units, strict=True)]
    sizes = [len(ids) for ids in translator.source.encode_batch([source for source, _ in pairs])]

    def measured(rows: Sequence[int]) -> tuple[Measure, ...]:
        exact, n_edits = sum(edits[i] == 0 for i in rows), sum(edits[i] for i in rows)
        return (
            Measure("pairs", len(rows), form=","),
            Measure("exact", exact / len(rows), lower_is_better=False, form=".2%"),
            Measure("error_rate", n_edits / max(1, sum(len(units[i]) for i in rows)), lower_is_better=True, form=".2%"),
            *_corpus_scores([texts[i] for i in rows], [references[i] for i in rows]),
        )

    whole = measured(range(len(pairs)))
    by_length = [
        ({"from": low, "to": high}, measured(rows))
        for low, high in LENGTHS
        if (rows := [i for i, n in enumerate(sizes) if low <= n <= (math.inf if high is None else high)])
    ]
    lines = [
        "source tokens     pairs     exact   token error rate    BLEU    chrF",
        _row("all", whole),
        *(_row(f"{span['from']}-{span['to'] or ''}", part) for span, part in by_length),
    ]
    parts = [span | Report(part).to_dict() for span, part in by_length]
    return Report(whole, {"by_length": parts}, tuple(lines))


def _row(span: str, measures: Sequence[Measure]) -> str:
    shown = {measure.name: format(measure.value, measure.form) for measure in measures}
    widths = {"pairs": 10, "exact": 10, "error_rate": 19, "bleu": 8, "chrf": 8}
    return f"{span:<13}" + "".join(f"{shown.get(name, '-'):>{width}}" for name, width in widths.items())


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """How many tokens must be put in, taken out or changed to make one of the other (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def _corpus_scores(texts: list[str], references: list[str]) -> tuple[Measure, ...]:
    try:
        from sacrebleu import corpus_bleu, corpus_chrf
    except ImportError:
        warnings.warn('no BLEU and chrF: sacrebleu is not installed; pip install "qkv[translation]"', stacklevel=3)
        return ()
    # Short targets have no four words in a row; effective order counts what there is.
    scores = {
        "bleu": corpus_bleu(texts, [references], use_effective_order=True),
        "chrf": corpus_chrf(texts, [references]),
    }
    return tuple(Measure(name, each.score, lower_is_better=False, form=".1f") for name, each in scores.items())
