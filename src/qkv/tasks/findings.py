"""What a model made of labelled items, beside what they are: measures, tables and pictures."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np

from qkv.tasks.evaluation import Measure


class Findings(ABC):
    """Base of what is found.

    Attributes:
        picture: The name of the file of its picture; None: it has none.
    """

    picture: ClassVar[str | None] = None

    @abstractmethod
    def measures(self) -> tuple[Measure, ...]:
        """The numbers that say how good the model is."""

    def details(self) -> dict[str, Any]:
        """What JSON says beside them; here nothing."""
        return {}

    def lines(self) -> list[str]:
        """A table for people; here none."""
        return []

    def draw(self, axes: Any) -> None:  # noqa: B027 - what has no picture is not asked
        """The picture, on the axes of matplotlib."""

    @property
    def inches(self) -> float:
        """Width and height of the picture."""
        return 5.0

    @final
    def save_picture(self, folder: Path) -> None:
        """Write the picture into a folder, if there is one and matplotlib is installed."""
        if self.picture is None:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        figure = Figure(figsize=(self.inches, self.inches), layout="constrained")
        self.draw(figure.add_subplot())
        figure.savefig(folder / self.picture, dpi=120)


class ByClass(Findings):
    """Base of the findings that count for each class how many items were rightly found, are, and were found.

    Attributes:
        labels: The names of the classes.
    """

    labels: tuple[str, ...]

    @abstractmethod
    def counted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three counts, each (classes,)."""

    @final
    def by_class(self) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and the number of items of each class; a share of nothing is 0."""
        right, true, found = self.counted()
        precision, recall = right / np.maximum(found, 1), right / np.maximum(true, 1)
        f1 = 2 * right / np.maximum(true + found, 1)
        columns = {"precision": precision, "recall": recall, "f1": f1, "items": true}
        return {label: {name: x[i].item() for name, x in columns.items()} for i, label in enumerate(self.labels)}

    @final
    def macro_f1(self) -> float:
        """The mean of F1 over the classes that there are."""
        scores = [row["f1"] for row in self.by_class().values() if row["items"]]
        return float(np.mean(scores)) if scores else 0.0

    def details(self) -> dict[str, Any]:
        return {"classes": self.by_class()}

    def lines(self) -> list[str]:
        width = max(5, *map(len, self.labels))
        rows = [f"{'class':<{width}}   precision   recall       f1    items"]
        for label, row in self.by_class().items():
            shares = f"{row['precision']:>9.1%}{row['recall']:>9.1%}{row['f1']:>9.3f}"
            rows.append(f"{label:<{width}}   {shares}{row['items']:>9,}")
        return rows


@final
@dataclass(frozen=True, eq=False)
class Confusion(ByClass):
    """Which classes are taken for which: how many items of each (rows) were taken for each (columns).

    Attributes:
        labels: The names of the classes.
        counts: (classes, classes).
    """

    labels: tuple[str, ...]
    counts: np.ndarray

    picture: ClassVar[str | None] = "confusion.png"

    @classmethod
    def of(cls, labels: Sequence[str], true: np.ndarray, found: np.ndarray) -> "Confusion":
        """From the numbers of the classes of each item, true and found."""
        n = len(labels)
        return cls(tuple(labels), np.bincount(true * n + found, minlength=n * n).reshape(n, n))

    def counted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.diag(self.counts), self.counts.sum(1), self.counts.sum(0)

    def measures(self) -> tuple[Measure, ...]:
        """Accuracy, and macro F1."""
        accuracy = np.trace(self.counts) / max(1, self.counts.sum())
        return (
            Measure("accuracy", float(accuracy), lower_is_better=False, form=".2%"),
            Measure("f1", self.macro_f1(), "mean over the classes", lower_is_better=False),
        )

    @property
    def inches(self) -> float:
        return max(4.0, 0.45 * len(self.labels) + 2)

    def draw(self, axes: Any) -> None:
        n, shares = len(self.labels), self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(n, n) if n <= 20 else ():
            if self.counts[i, j]:
                shade = "white" if shares[i, j] > 0.6 else "black"
                axes.text(j, i, f"{self.counts[i, j]:,}", ha="center", va="center", color=shade, fontsize=8)
        axes.set(xticks=range(n), yticks=range(n), xlabel="taken for", ylabel="is")
        axes.set_xticklabels(self.labels, rotation=45 if max(map(len, self.labels)) > 2 else 0, ha="right")
        axes.set_yticklabels(self.labels)


@final
@dataclass(frozen=True, eq=False)
class FoundSets(ByClass):
    """Items of several classes each: those that they have, and those that were found.

    Attributes:
        labels: The names of the classes.
        true, found: Of each item, (items, classes), truth values.
    """

    labels: tuple[str, ...]
    true: np.ndarray
    found: np.ndarray

    def counted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return (self.true & self.found).sum(0), self.true.sum(0), self.found.sum(0)

    def measures(self) -> tuple[Measure, ...]:
        """F1 over all pairs of item and class (micro F1), macro F1, and the share of items whose set is right."""
        right, true, found = (each.sum() for each in self.counted())
        exact = (self.true == self.found).all(1)
        return (
            Measure("micro_f1", float(2 * right / max(1, true + found)), lower_is_better=False),
            Measure("f1", self.macro_f1(), "mean over the classes", lower_is_better=False),
            Measure("exact", float(exact.mean()) if len(exact) else 0.0, lower_is_better=False, form=".2%"),
        )


@final
@dataclass(frozen=True, eq=False)
class FoundNumbers(Findings):
    """Numbers of items: those that they have, and those that were found.

    Attributes:
        true, found: Of each item, (items,), in the units of the data.
    """

    true: np.ndarray
    found: np.ndarray

    picture: ClassVar[str | None] = "numbers.png"

    def measures(self) -> tuple[Measure, ...]:
        """Root of the mean squared error, mean absolute error, and the share of the variance that is explained (R²).

        Where all numbers are equal there is no variance and no R².
        """
        error = self.found - self.true
        variance = self.true.var()
        unit = "in the units of the data"
        return (
            Measure("rmse", float(np.sqrt(np.square(error).mean())), unit, lower_is_better=True, form=".4g"),
            Measure("mae", float(np.abs(error).mean()), unit, lower_is_better=True, form=".4g"),
            *(
                [Measure("r2", float(1 - np.square(error).mean() / variance), lower_is_better=False)]
                if variance
                else []
            ),
        )

    def draw(self, axes: Any) -> None:
        ends = [min(self.true.min(), self.found.min()), max(self.true.max(), self.found.max())]
        axes.plot(ends, ends, color="black", linewidth=1, zorder=1)
        axes.scatter(self.true, self.found, s=max(2, min(20, 4000 / len(self.true))), alpha=0.5, linewidths=0, zorder=2)
        axes.set(xlabel="is", ylabel="found", aspect="equal")
