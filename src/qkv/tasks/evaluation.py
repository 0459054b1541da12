"""How good a model is: named numbers, each with a unit and a direction."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch

from qkv.data import Batches
from qkv.models.model import Model


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
    """The sum of the losses (nats, or squared errors), and over how many tokens."""

    total: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean loss per token."""
        return self.total / max(1, self.tokens)


def evaluate(model: Model, batches: Batches, *, limit: int | None = None) -> Evaluation:
    """The loss over the batches of a split, the first `limit` of them, or all; without dropout."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(len(batches) if limit is None else min(limit, len(batches))):
            batch = batches.batch(0, i)
            count += model.head.count(batch.targets, batch.tokens.valid)
            batch = batch.to(device)
            loss, _ = model.loss(batch.inputs, batch.targets, batch.tokens, scale=1.0)
            total += loss.item()
    model.train(training)
    return Evaluation(total, count)
