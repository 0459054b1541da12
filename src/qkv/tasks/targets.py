"""What each labelled item has: one class, several, or a number. What is said of it, as targets and back."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar, final

import torch

from qkv.config import Config, Positive, config
from qkv.errors import ConfigError, FileError
from qkv.loading.facts import Facts
from qkv.nn.heads import (
    BinaryCrossEntropyConfig,
    ClassHeadConfig,
    CrossEntropyConfig,
    ObjectiveConfig,
    SquaredErrorConfig,
)
from qkv.ops.loss import IGNORE
from qkv.shapes import Float, Tensor
from qkv.tasks.findings import Confusion, Findings, FoundNumbers, FoundSets

_LONGEST_NUMBER = 300  # digits of a class that is a number

T = TypeVar("T", bound="TargetsConfig")


@config
class TargetsConfig(Config, ABC):
    """Base of what items may have. What a config leaves open is set by the items to train on, in `fitted`."""

    objective: ClassVar[ObjectiveConfig]
    unit: ClassVar[str] = "nats"
    """Of the loss of an item."""
    of_words: ClassVar[bool] = False
    """Whether each word of an item has its own, and not the item as a whole."""

    @property
    @abstractmethod
    def n(self) -> int:
        """Outputs that a head needs for them."""

    @abstractmethod
    def parse(self, label: Any, where: str) -> Any:
        """What an item has, from what a source says of it. Raises `FileError` where that says nothing of the kind."""

    @abstractmethod
    def fitted(self: T, parsed: Sequence[Any]) -> T:
        """The same for what the items to train on have; `FileError` where there is nothing to learn."""

    @abstractmethod
    def encoded(self, parsed: Sequence[Any], where: Sequence[str]) -> Tensor | list[Tensor]:
        """The targets, (items, …), or those of the words of each, (words,).

        Raises:
            FileError: One has what no item to train on has.
        """

    @abstractmethod
    def findings(self, targets: Tensor, outputs: Float[Tensor, "items n"]) -> Findings:
        """What a model made of items."""

    @abstractmethod
    def facts(self) -> Facts:
        """What is to be known where the model is used."""

    @abstractmethod
    def of_facts(self: T, facts: Facts) -> T:
        """The same for a trained model of which that is known."""

    @abstractmethod
    def note(self) -> str:
        """In a few words, for people."""

    @final
    def head(self, head: ClassHeadConfig) -> ClassHeadConfig:
        """The head with as many outputs, and the objective. Raises `ConfigError` where it is set to others."""
        if head.n_classes not in (None, self.n):
            raise ConfigError(f"the head has n_classes={head.n_classes} and the data {self.n}; leave it out")
        if head.objective not in (CrossEntropyConfig(), self.objective):
            raise ConfigError(
                f"the head has the objective {head.objective.tag()} and data.targets are {self.tag()}, with "
                f"{self.objective.tag()}; leave it out, or name other targets"
            )
        return head.replace(n_classes=self.n, objective=self.objective)


@final
@config
class OneClassConfig(TargetsConfig):
    """Each item is of one class.

    Attributes:
        labels: The names of the classes, in the order of the head's outputs; none: those of what is trained on, sorted.
    """

    labels: tuple[str, ...] = ()

    objective: ClassVar[ObjectiveConfig] = CrossEntropyConfig()

    @property
    def n(self) -> int:
        return len(self.labels)

    def parse(self, label: Any, where: str) -> str:
        return _name(label, where)

    def fitted(self, parsed: Sequence[str]) -> "OneClassConfig":
        return self.replace(labels=_classes(self.labels, parsed))

    def encoded(self, parsed: Sequence[str], where: Sequence[str]) -> Tensor:
        numbers = _numbers(self.labels)
        return torch.tensor([_find(numbers, *each) for each in zip(parsed, where, strict=True)], dtype=torch.int64)

    def findings(self, targets: Tensor, outputs: Float[Tensor, "items n"]) -> Confusion:
        return Confusion.of(self.labels, targets.numpy(), outputs.argmax(-1).numpy())

    def facts(self) -> Facts:
        return Facts(labels=self.labels)

    def of_facts(self, facts: Facts) -> "OneClassConfig":
        return self.replace(labels=facts.labels)

    def note(self) -> str:
        return f"{self.n} classes"


@final
@config
class WordClassesConfig(TargetsConfig):
    """Each word of a text is of one class; the first token of the word says it.

    Attributes:
        labels: The names of the classes, in the order of the head's outputs; none: those of what is trained on, sorted.
    """

    labels: tuple[str, ...] = ()

    objective: ClassVar[ObjectiveConfig] = CrossEntropyConfig()
    of_words: ClassVar[bool] = True

    @property
    def n(self) -> int:
        return len(self.labels)

    def parse(self, label: Any, where: str) -> tuple[str, ...]:
        return tuple(_name(each, where) for each in label)

    def fitted(self, parsed: Sequence[tuple[str, ...]]) -> "WordClassesConfig":
        return self.replace(labels=_classes(self.labels, [label for each in parsed for label in each]))

    def encoded(self, parsed: Sequence[tuple[str, ...]], where: Sequence[str]) -> list[Tensor]:
        one = OneClassConfig(labels=self.labels)
        return [one.encoded(labels, [place] * len(labels)) for labels, place in zip(parsed, where, strict=True)]

    def findings(self, targets: Tensor, outputs: Float[Tensor, "items n"]) -> Confusion:
        said = targets != IGNORE
        return OneClassConfig(labels=self.labels).findings(targets[said], outputs[said])

    def facts(self) -> Facts:
        return Facts(labels=self.labels)

    def of_facts(self, facts: Facts) -> "WordClassesConfig":
        return self.replace(labels=facts.labels)

    def note(self) -> str:
        return f"{self.n} classes of words"


@final
@config
class SeveralClassesConfig(TargetsConfig):
    """Each item is of any number of classes, also of none. One whose probability is at least 0.5 is found.

    Attributes:
        separator: What stands between the names of classes in a text, such as ";"; None: they are a list, in JSON.
        labels: The names of the classes, in the order of the head's outputs; none: those of what is trained on, sorted.
    """

    separator: str | None = None
    labels: tuple[str, ...] = ()

    objective: ClassVar[ObjectiveConfig] = BinaryCrossEntropyConfig()

    def __post_init__(self) -> None:
        if self.separator == "":
            raise ConfigError('separator is empty; give what stands between the names of classes, such as ";"')

    @property
    def n(self) -> int:
        return len(self.labels)

    def parse(self, label: Any, where: str) -> tuple[str, ...]:
        if isinstance(label, str) and self.separator is not None:
            label = [part for part in label.split(self.separator) if part.strip()]
        if not isinstance(label, list | tuple):
            raise FileError(
                f"{where} is {label!r:.60} and must be a list of classes; write one, or set data.targets.separator to "
                "what stands between them"
            )
        return tuple(dict.fromkeys(_name(each, where) for each in label))

    def fitted(self, parsed: Sequence[tuple[str, ...]]) -> "SeveralClassesConfig":
        return self.replace(labels=_classes(self.labels, [label for each in parsed for label in each]))

    def encoded(self, parsed: Sequence[tuple[str, ...]], where: Sequence[str]) -> Tensor:
        numbers, targets = _numbers(self.labels), torch.zeros(len(parsed), self.n)
        for row, labels, place in zip(targets, parsed, where, strict=True):
            row[[_find(numbers, label, place) for label in labels]] = 1
        return targets

    def findings(self, targets: Tensor, outputs: Float[Tensor, "items n"]) -> FoundSets:
        found = self.objective.probabilities(outputs) >= 0.5
        return FoundSets(self.labels, targets.numpy() > 0, found.numpy())

    def facts(self) -> Facts:
        return Facts(labels=self.labels)

    def of_facts(self, facts: Facts) -> "SeveralClassesConfig":
        return self.replace(labels=facts.labels)

    def note(self) -> str:
        return f"{self.n} classes, any number of each"


@final
@config
class NumbersConfig(TargetsConfig):
    """Each item has a number: regression. A model learns (number - mean) / std, and what it says is put back.

    Attributes:
        mean: None: that of what is trained on.
        std: Standard deviation; None: as of the mean.
    """

    mean: float | None = None
    std: Positive | None = None

    objective: ClassVar[ObjectiveConfig] = SquaredErrorConfig()
    unit: ClassVar[str] = "squared standard deviations"

    @property
    def n(self) -> int:
        return 1

    def parse(self, label: Any, where: str) -> float:
        try:
            found = float(label) if isinstance(label, str | int | float) and not isinstance(label, bool) else math.nan
        except (ValueError, OverflowError):
            found = math.nan
        if not math.isfinite(found):
            raise FileError(f"{where} is {label!r:.60} and must be a finite number; correct it, or leave the item out")
        return found

    def fitted(self, parsed: Sequence[float]) -> "NumbersConfig":
        numbers = torch.tensor(parsed, dtype=torch.float64)
        mean = numbers.mean().item() if self.mean is None else self.mean
        std = numbers.std(correction=0).item() if self.std is None else self.std
        if not math.isfinite(std) or not math.isfinite(mean):
            raise FileError("the data: the numbers are too large for their mean and deviation; divide them")
        if not std > 1e-12 * abs(mean):
            raise FileError(f"the data: the numbers of all items are {mean:g}; give several, or set data.targets.std")
        return self.replace(mean=mean, std=std)

    def encoded(self, parsed: Sequence[float], where: Sequence[str]) -> Tensor:
        mean, std = self._scale
        return ((torch.tensor(parsed, dtype=torch.float64) - mean) / std)[:, None].float()

    def findings(self, targets: Tensor, outputs: Float[Tensor, "items n"]) -> FoundNumbers:
        mean, std = self._scale
        return FoundNumbers(*((x[:, 0].double() * std + mean).numpy() for x in (targets, outputs)))

    def facts(self) -> Facts:
        return Facts(scale=self._scale)

    def of_facts(self, facts: Facts) -> "NumbersConfig":
        mean, std = facts.scale or (0.0, 1.0)
        return self.replace(mean=mean, std=std)

    def note(self) -> str:
        mean, std = self._scale
        return f"a number each, of mean {mean:.4g} and standard deviation {std:.4g}"

    @property
    def _scale(self) -> tuple[float, float]:
        assert self.mean is not None
        assert self.std is not None
        return self.mean, self.std


def targets_for(head: ClassHeadConfig) -> TargetsConfig:
    """Those that a head learns."""
    wanted = (head.objective, head.pool is None)
    return next(cls() for cls in TargetsConfig.__subclasses__() if (cls.objective, cls.of_words) == wanted)


def _name(label: Any, where: str) -> str:
    """The name of a class; whole numbers and truth values are names, too."""
    if isinstance(label, bool | int):
        return str(label)
    if not isinstance(label, str):
        raise FileError(
            f"{where} is {label!r:.60} and must be the name of a class; for numbers set data.targets to Numbers, for "
            "several classes to SeveralClasses"
        )
    if not label.strip():
        raise FileError(f"{where} is empty; fill it in, or leave the item out")
    return label.strip()


def _classes(given: tuple[str, ...], found: Sequence[str]) -> tuple[str, ...]:
    """The classes that are given, or those that are found, sorted; whole numbers by size, equal ones as written."""
    names = set(given or found)
    if len(names) < 2 or len(names) < len(given):
        said = ", ".join(map(repr, given or names)) or "none"
        raise FileError(f"the data: the classes of all items are {said}; give two classes or more, each once")
    if given:
        return given
    whole = all(label.removeprefix("-").isdecimal() and len(label) <= _LONGEST_NUMBER for label in names)
    return tuple(sorted(names, key=lambda label: (int(label) if whole else 0, label)))


def _numbers(labels: tuple[str, ...]) -> dict[str, int]:
    return {label: i for i, label in enumerate(labels)}


def _find(numbers: dict[str, int], label: str, where: str) -> int:
    if label not in numbers:
        known = ", ".join([*numbers][:10])
        raise FileError(f"{where} is {label!r}, and the model has no such class; there are {known}")
    return numbers[label]
