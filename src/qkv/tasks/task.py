"""What a run learns. A new task is one new file: a config for the `data` of a recipe, and the task that it prepares."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, final, runtime_checkable

from qkv.config import Config, config
from qkv.data import Batches
from qkv.errors import ConfigError, FileError, suggest
from qkv.generation import USUAL, SamplingConfig
from qkv.loading.ready import Ready
from qkv.models.model import Model, ModelConfig
from qkv.nn.adapters import LoRAConfig
from qkv.tasks.evaluation import Evaluation, Measure, Report, evaluate
from qkv.yaml_files import expand_home


@final
@config
class SampleConfig(Config):
    """The text that a run writes after each evaluation.

    Attributes:
        prompt: What it goes on from; empty: the beginning of a document. Where the data are conversations, what the
            user says, to which the text is the answer. Of pairs, the source; empty: the first that were held out. Where
            tokens are masked, a text with masks; empty: the first that was held out.
        tokens: How many tokens at most.
        temperature: As in generation. Not of pairs, nor of masked tokens.
    """

    prompt: str = ""
    tokens: int = 120
    temperature: float = USUAL.temperature

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"sample.tokens={self.tokens} must be at least 1; to write no sample, set sample to null")
        self.sampling(seed=0)

    def sampling(self, seed: int) -> SamplingConfig:
        """How its tokens are drawn."""
        return SamplingConfig(temperature=self.temperature, seed=seed)


class Start(NamedTuple):
    """Trained weights that a run begins with: where they are, and what `qkv.load` makes of them."""

    path: str
    opened: Any


@runtime_checkable
class Recipe(Protocol):
    """What a task sees of a run's recipe; see `RecipeConfig`."""

    @property
    def data(self) -> "TaskConfig": ...
    @property
    def model(self) -> ModelConfig | None: ...
    @property
    def start(self) -> object | None: ...
    @property
    def adapter(self) -> LoRAConfig | None: ...
    @property
    def context(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def sample(self) -> SampleConfig | None: ...


@final
@dataclass(frozen=True)
class Asked:
    """What `qkv eval` was asked for.

    Attributes:
        path: The model: a run, or anything else that `qkv.load` takes.
        data: What to measure it on; None: what its run held out.
        recipe: That of the run, where there are no DATA; None: the model is no run of ours.
        trained: What the run was trained on; None: that is not known.
        fingerprint: Of the data that the run was trained on.
        beams: Of a search.
        length_penalty: Of a search.
        conversations: Whether the data are conversations.
        field: The key of the text in JSON Lines.
    """

    path: Path
    data: Path | None = None
    recipe: Recipe | None = None
    trained: "TaskConfig | None" = None
    fingerprint: str | None = None
    beams: int = 1
    length_penalty: float = 1.0
    conversations: bool = False
    field: str | None = None

    def refuse(self, *names: str, of: str) -> None:
        """Raise `ConfigError` where an option is set that belongs to other models, such as `of="language models"`."""
        defaults = {field.name: field.default for field in fields(self)}
        if any(getattr(self, name) != defaults[name] for name in names):
            options = " and ".join(f"--{name.replace('_', '-')}" for name in names)
            raise ConfigError(f"{options} are for {of}; leave them out")


class Task(ABC):
    """Data that are ready, and what a run makes of them.

    Attributes:
        unit: Of its loss.
    """

    unit: ClassVar[str] = ""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of the data: their order means nothing for others."""

    @abstractmethod
    def complete(self, model: ModelConfig, recipe: Recipe) -> ModelConfig:
        """The model with the sizes that only the data know.

        Raises:
            ConfigError: The model, or something else in the recipe, does not fit the data.
        """

    @abstractmethod
    def batches(self, recipe: Recipe) -> tuple[Batches, Batches | None]:
        """What to train on, and what is held out, if anything is."""

    @abstractmethod
    def sample(self, model: Model, recipe: Recipe, settings: SampleConfig) -> str:
        """Something that the model makes, for people to see how far it is."""

    def save(self, folder: Path) -> None:  # noqa: B027 - nothing to save is a good default
        """Write what `TaskConfig.open` needs besides the model into a new run folder; here nothing."""

    def evaluate(
        self,
        model: Model,
        batches: Batches,
        *,
        limit: int | None = None,
        goes_on: Callable[[int, int], bool] = lambda *_: True,
    ) -> Evaluation:
        """The loss over held-out batches, as `qkv.tasks.evaluate`; a task may keep what its `measures` need."""
        return evaluate(model, batches, limit=limit, goes_on=goes_on)

    def measures(self, model: Model, found: Evaluation) -> tuple[Measure, ...]:
        """What is logged beside the loss when all that is held out has been evaluated; here nothing."""
        return ()

    def pictures(self, folder: Path) -> None:  # noqa: B027 - none is a good default
        """Draw what the last `measures` found, into the run's folder; here nothing."""

    def notes(self, recipe: Recipe) -> Iterable[str]:
        """What to say about the data when a run begins; here nothing."""
        return ()

    def next_steps(self, folder: str) -> str | None:
        """The verbs that a person may want after training; None: none."""
        return None


@config
class TaskConfig(Config, ABC):
    """Base of what the `data` of a recipe may be."""

    opens: ClassVar[type[Ready]]
    """What `qkv.load` hands out for its runs: `qkv.loading.ready.Bare`, or a `Ready` of its own."""
    keeps_start: ClassVar[bool] = False
    """Whether a run holds all that its `start` brought, and does not ask for that again once it has a checkpoint."""

    def check(self, recipe: Recipe) -> None:
        """Raise `ConfigError` where the recipe does not go with the task, whatever the data; here never."""

    def notes(self) -> Iterable[str]:
        """What to say about the data before they are read; here nothing."""
        return ()

    @abstractmethod
    def prepare(self, start: Start | None = None) -> Task:
        """Read the data; with a `start`, its tokenizer is the run's."""

    @classmethod
    @abstractmethod
    def open(cls, folder: Path, model: Model) -> Ready:
        """What `qkv.load` hands out for a run, whose model this is, in evaluation mode."""

    @classmethod
    def evaluate(cls, opened: Any, asked: Asked) -> Report:
        """What `qkv eval` reports; here the loss on what the run held out, and the measures of the task."""
        asked.refuse("beams", "length_penalty", of="models of pairs")
        asked.refuse("conversations", "field", of="language models")
        if asked.recipe is None or asked.data is not None:
            raise ConfigError(f"a model of {cls.tag()} is measured on what its run held out; give a run, and no DATA")
        task = asked.recipe.data.prepare(Start(str(asked.path), opened))
        check_same(task, asked)
        _, held_out = task.batches(asked.recipe)
        if held_out is None:
            raise ConfigError(f"{asked.path} held out nothing (validation=0), so there is nothing to measure it on")
        found = task.evaluate(opened.model, held_out)
        return cls.report(task.unit, found, task.measures(opened.model, found))

    @staticmethod
    def report(unit: str, found: Evaluation, measures: Iterable[Measure]) -> Report:
        """The loss, in such a unit, what else was measured, and over how many tokens."""
        loss = Measure("loss", found.loss, unit, lower_is_better=True)
        return Report((loss, *measures, Measure("tokens", found.tokens, form=",")))

    @classmethod
    def measures_a(cls, opened: object) -> bool:
        """Whether it can tell how good such a model is, though its run is not known; here where it opens its like."""
        return isinstance(opened, cls.opens)


def absolute(config: Any) -> Any:
    """The same config with every `path` that exists made absolute, also in the configs inside; a name stays a name."""
    changes: dict[str, Any] = {}
    for name in (field.name for field in fields(config)):
        value = getattr(config, name)
        if isinstance(value, Config):
            changes[name] = absolute(value)
        elif name in ("path", "validation") and isinstance(value, str | tuple):
            changes[name] = _absolute(value) if isinstance(value, str) else tuple(map(_absolute, value))
    return replace(config, **changes)


def _absolute(path: str) -> str:
    place = expand_home(path)
    return str(place.absolute()) if place.exists() or "*" in path else path


def check_same(task: Task, asked: Asked) -> None:
    """Raise `FileError` where the data are not those that the run was trained on, so that nothing is held out."""
    if asked.fingerprint != task.fingerprint:
        raise FileError(
            f"{asked.path}: its corpus is another one than it was trained on, so that nothing is known to be held out; "
            "put it back as it was, or give DATA"
        )


def task_named(tag: object) -> type[TaskConfig]:
    """The task whose config has this name in files."""
    known = {cls.tag(): cls for cls in TaskConfig.__subclasses__()}
    if not isinstance(tag, str) or tag not in known:
        raise ConfigError(f"there is no task {str(tag)!r}; {suggest(str(tag), known)}")
    return known[tag]


def task_of(opened: object) -> type[TaskConfig] | None:
    """The first task that measures such an object; None: there is none."""
    return next((cls for cls in TaskConfig.__subclasses__() if cls.measures_a(opened)), None)
