"""What the outputs of a classifier are trained for: one class, several, or numbers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, final

import torch.nn.functional as F

from qkv.config import Config, config
from qkv.errors import ConfigError
from qkv.ops.loss import IGNORE
from qkv.shapes import Float, Tensor


@config
class ObjectiveConfig(Config, ABC):
    """Base of the objectives: values that compare outputs with targets."""

    gives: ClassVar[str]
    """What the outputs are, in a drawing."""

    def shape(self, outputs: Sequence[int], targets: Tensor) -> tuple[int, ...]:
        """That which targets of this type have for outputs (*items, out); here the same."""
        return tuple(outputs)

    @abstractmethod
    def loss(self, outputs: Float[Tensor, "*items out"], targets: Tensor) -> Float[Tensor, ""]:
        """Summed over the items that have a target."""

    def count(self, targets: Tensor) -> int:
        """How many items have a target; here all."""
        return targets.shape[:-1].numel()

    @abstractmethod
    def probabilities(self, outputs: Float[Tensor, "*items out"]) -> Float[Tensor, "*items out"]:
        """How likely each class is; `ConfigError` where there are no classes."""


@final
@config
class CrossEntropyConfig(ObjectiveConfig):
    """Each item is of one class: the softmax of the outputs, trained with cross-entropy in nats.

    Targets are numbers of classes, (*items,); -100: the item has none. Or they are the shares of the classes in each
    item, (*items, out) in floating point, as of pictures that were mixed.
    """

    gives: ClassVar[str] = "classes"

    def shape(self, outputs: Sequence[int], targets: Tensor) -> tuple[int, ...]:
        return tuple(outputs if targets.is_floating_point() else outputs[:-1])

    def loss(self, outputs: Float[Tensor, "*items out"], targets: Tensor) -> Float[Tensor, ""]:
        rows = outputs.flatten(0, -2)
        if targets.is_floating_point():
            return F.cross_entropy(rows, targets.view_as(rows).to(rows.dtype), reduction="sum")
        return F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORE, reduction="sum")

    def count(self, targets: Tensor) -> int:
        return super().count(targets) if targets.is_floating_point() else int((targets != IGNORE).sum())

    def probabilities(self, outputs: Float[Tensor, "*items out"]) -> Float[Tensor, "*items out"]:
        return outputs.softmax(-1)


@final
@config
class BinaryCrossEntropyConfig(ObjectiveConfig):
    """Each class is there or not, whatever the others: the sigmoid of each output, trained with cross-entropy in nats.

    Targets are 1 where a class is there, else 0. The loss of an item is the mean over the classes.
    """

    gives: ClassVar[str] = "classes, several of each"

    def loss(self, outputs: Float[Tensor, "*items out"], targets: Tensor) -> Float[Tensor, ""]:
        wanted = targets.to(outputs.dtype)
        return F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none").mean(-1).sum()

    def probabilities(self, outputs: Float[Tensor, "*items out"]) -> Float[Tensor, "*items out"]:
        return outputs.sigmoid()


@final
@config
class SquaredErrorConfig(ObjectiveConfig):
    """The outputs are numbers, trained with the squared error: regression. That of an item is the mean over them."""

    gives: ClassVar[str] = "numbers"

    def loss(self, outputs: Float[Tensor, "*items out"], targets: Tensor) -> Float[Tensor, ""]:
        return (outputs - targets.to(outputs.dtype)).square().mean(-1).sum()

    def probabilities(self, outputs: Float[Tensor, "*items out"]) -> Float[Tensor, "*items out"]:
        raise ConfigError("the model's head gives numbers, which are not likely or unlikely; use `predict`")
