"""How good a model is: named numbers, each with a unit and a direction."""

import contextlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, final

import torch

from qkv.data import Batches
from qkv.models.model import Model, evaluating
from qkv.nn.sublayer import merge
from qkv.shapes import Tensor


@final
@dataclass(frozen=True)
class Measure:
    """A number that was measured.

    Attributes:
        name: What it is called in files; people see it with spaces for underscores.
        value: The number.
        unit: Of it; empty: it has none.
        lower_is_better: None: it is a size, and neither is better.
        form: How it is printed.
    """

    name: str
    value: float
    unit: str = ""
    lower_is_better: bool | None = None
    form: str = ".4f"

    def __str__(self) -> str:
        name = self.name.replace("_", " ")
        return f"{name:<14}{format(self.value, self.form):>14}  {self.unit}".rstrip()


@final
@dataclass(frozen=True)
class Report:
    """What `qkv eval` prints.

    Attributes:
        measures: The numbers.
        details: What JSON says beside them.
        lines: What people see instead of a line for each measure.
    """

    measures: tuple[Measure, ...]
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lines: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {measure.name: measure.value for measure in self.measures} | dict(self.details)

    def __str__(self) -> str:
        return "\n".join(self.lines or map(str, self.measures))


class Evaluation(NamedTuple):
    """What a pass over data found.

    Attributes:
        total: The sum of the losses (nats, or squared errors).
        tokens: Over how many tokens.
        extra: The sums of what sublayers add to the loss in training, by name.
    """

    total: float
    tokens: int
    extra: Mapping[str, float] = MappingProxyType({})

    @property
    def loss(self) -> float:
        """Mean loss per token."""
        return self.total / max(1, self.tokens)


def evaluate(
    model: Model,
    batches: Batches,
    *,
    limit: int | None = None,
    goes_on: Callable[[int, int], bool] = lambda *_: True,
    outputs: list[tuple[Tensor, Tensor]] | None = None,
) -> Evaluation:
    """The loss over the batches of a split; without dropout.

    Args:
        model: What is measured.
        batches: Those of the split.
        limit: Only the first so many; None: all.
        goes_on: Is asked before each batch, with those done and their number, and ends it early where it says no.
        outputs: Is given the targets and the head's outputs of each batch, for a head that makes them for its loss.
    """
    device = next(model.parameters()).device
    total, count, report = 0.0, 0, None
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        if outputs is not None:
            keep = model.head.register_forward_hook(lambda _, __, made: outputs.append((batch.targets, made)))
            stack.callback(keep.remove)
        n = len(batches) if limit is None else min(limit, len(batches))
        for i in itertools.takewhile(lambda i: goes_on(i, n), range(n)):
            batch = batches.batch(0, i)
            count += model.head.count(batch.targets, batch.tokens)
            batch = batch.to(device)
            loss, aux = model.loss(batch.inputs, batch.targets, batch.tokens, scale=1.0)
            total, report = total + loss.item(), merge(report, aux)
    return Evaluation(total, count, {} if report is None else {k: x.item() for k, x in report.losses.items()})
