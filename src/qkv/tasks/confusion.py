"""Which classes are taken for which: a table, measures, and a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from qkv.tasks.evaluation import Measure


@final
@dataclass(frozen=True, eq=False)
class Confusion:
    """How many items of each class (rows) were taken for each (columns).

    Attributes:
        labels: The names of the classes.
        counts: (classes, classes).
    """

    labels: tuple[str, ...]
    counts: np.ndarray

    @classmethod
    def of(cls, labels: tuple[str, ...], true: np.ndarray, found: np.ndarray) -> "Confusion":
        """From the numbers of the classes of each item, true and found."""
        n = len(labels)
        return cls(labels, np.bincount(true * n + found, minlength=n * n).reshape(n, n))

    def by_class(self) -> dict[str, dict[str, float]]:
        """Precision, recall, F1 and the number of items of each class; a share of nothing is 0."""
        right, true, found = np.diag(self.counts), self.counts.sum(1), self.counts.sum(0)
        precision, recall = right / np.maximum(found, 1), right / np.maximum(true, 1)
        f1 = 2 * right / np.maximum(true + found, 1)
        columns = {"precision": precision, "recall": recall, "f1": f1, "items": true}
        return {label: {name: x[i].item() for name, x in columns.items()} for i, label in enumerate(self.labels)}

    def measures(self) -> tuple[Measure, ...]:
        """Accuracy, and the mean of F1 over the classes that there are (macro F1)."""
        accuracy = np.trace(self.counts) / max(1, self.counts.sum())
        scores = [row["f1"] for row in self.by_class().values() if row["items"]]
        return (
            Measure("accuracy", float(accuracy), lower_is_better=False, form=".2%"),
            Measure("f1", float(np.mean(scores)) if scores else 0.0, "mean over the classes", lower_is_better=False),
        )

    def lines(self) -> list[str]:
        """A table for people."""
        width = max(5, *map(len, self.labels))
        rows = [f"{'class':<{width}}   precision   recall       f1    items"]
        for label, row in self.by_class().items():
            shares = f"{row['precision']:>9.1%}{row['recall']:>9.1%}{row['f1']:>9.3f}"
            rows.append(f"{label:<{width}}   {shares}{row['items']:>9,}")
        return rows

    def draw(self, path: Path) -> None:
        """A picture of the table, if matplotlib is installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        n, size = len(self.labels), max(4.0, 0.45 * len(self.labels) + 2)
        figure = Figure(figsize=(size, size), layout="constrained")
        axes: Any = figure.add_subplot()
        shares = self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(n, n) if n <= 20 else ():
            if self.counts[i, j]:
                shade = "white" if shares[i, j] > 0.6 else "black"
                axes.text(j, i, f"{self.counts[i, j]:,}", ha="center", va="center", color=shade, fontsize=8)
        axes.set(xticks=range(n), yticks=range(n), xlabel="taken for", ylabel="is")
        axes.set_xticklabels(self.labels, rotation=45 if max(map(len, self.labels)) > 2 else 0, ha="right")
        axes.set_yticklabels(self.labels)
        figure.savefig(path, dpi=120)
