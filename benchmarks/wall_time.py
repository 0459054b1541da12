"""A recipe of qkv against a nanoGPT-style loop: the same corpus, tokens, size and wall time.

    python benchmarks/wall_time.py --json wall_time.json --plot wall_time.png

The recipe runs as it is. The peer then gets as many seconds as that took, once for each `--lr`, and its best run
counts. Each has the whole machine, one after the other; seconds are those of training, without evaluation. The peer is
a GPT-2 with as many parameters, trained as nanoGPT does: random crops of one long stream of tokens, AdamW, 2 % warm-up,
a cosine down to a tenth, no dropout. Its schedule follows the clock, so that it ends with its time. It chooses its
precision as qkv does, by timing, and both are evaluated in float32, on the same pieces of held-out text.
"""

import argparse
import json
import math
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from peers.nano import GPT
from peers.shapes import Shape
from qkv.data import Dataset, PackedBatches
from qkv.models.transformer import Transformer
from qkv.training import RecipeConfig, read_recipe
from qkv.training.memory import keep_pages
from qkv.training.precision import fastest, products_in
from qkv.training.trainer import Trainer

Pieces = list[tuple[Tensor, Tensor]]


class Contestant(ABC):
    """A model in training, with the seconds and tokens that went into it so far."""

    seconds = 0.0
    tokens = 0

    def __init__(self, name: str, model: nn.Module, precision: str) -> None:
        self.name, self.model, self.precision = name, model, precision

    @abstractmethod
    def update(self) -> int:
        """One step of training; returns its tokens."""

    @property
    @abstractmethod
    def progress(self) -> float:
        """The share of the training that is done."""

    @abstractmethod
    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss on rows without padding."""


@final
class Ours(Contestant):
    """The recipe, in qkv's own trainer."""

    def __init__(self, trainer: Trainer) -> None:
        trainer.choose_precision()
        super().__init__("qkv", trainer.model, trainer.recipe.precision)
        self.trainer = trainer

    def update(self) -> int:
        """One step of the recipe."""
        return self.trainer.update()["tokens"]

    @property
    def progress(self) -> float:
        """The share of the recipe's steps."""
        return self.trainer.step / self.trainer.recipe.steps

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss."""
        return self.trainer.model.loss(inputs, targets)[0]


@final
class Nano(Contestant):
    """The loop of nanoGPT, for `budget` seconds."""

    def __init__(self, shape: Shape, recipe: RecipeConfig, stream: np.ndarray, lr: float, budget: float) -> None:
        torch.manual_seed(recipe.seed)
        super().__init__(f"nano, lr {lr:g}", GPT(shape), "float32")
        self.lr, self.budget, self.stream = lr, budget, stream
        self.rows, self.length = recipe.batch_size, recipe.context
        self.random = np.random.default_rng(recipe.seed)
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
        self.precision, _ = fastest(self._gradients)
        self.optimizer.zero_grad()

    def _gradients(self, precision: str) -> None:
        starts = self.random.integers(0, len(self.stream) - self.length, self.rows)
        crops = torch.from_numpy(np.stack([self.stream[i : i + self.length + 1] for i in starts]).astype(np.int64))
        with products_in(precision, torch.device("cpu")):
            loss = self.model(crops[:, :-1], crops[:, 1:])
        loss.backward()

    def update(self) -> int:
        """One step; the learning rate follows the clock."""
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * self.progress)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(cosine, (self.progress + 1e-3) / 0.02)
        self._gradients(self.precision)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.rows * self.length

    @property
    def progress(self) -> float:
        """The share of the time."""
        return self.seconds / self.budget

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss."""
        return self.model(inputs, targets)


def matching_shape(model: Transformer, vocab_size: int, context: int) -> Shape:
    """The GPT-2 of the same depth and width, its MLP a little off nanoGPT's 4 d_model to have as many parameters."""
    d, n_layers = model.config.d_model, len(model.blocks)
    rest = (vocab_size + context) * d + n_layers * (4 * d * d + 9 * d) + 2 * d
    d_ff = 32 * round((count(model) - rest) / (n_layers * (2 * d + 1)) / 32)
    n_parameters = rest + n_layers * (2 * d + 1) * d_ff
    if abs(n_parameters / count(model) - 1) > 0.02:
        sys.exit(f"no GPT-2 of this width has {count(model):,} parameters within 2 %; choose another recipe")
    return Shape("gpt2", d, n_layers, d // 64, d // 64, d_ff, vocab_size, context, n_parameters)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- training against the clock ---------------------------------------------------------------------------------------


@dataclass
class Result:
    """One run. `curve` has (seconds, loss on some of the held-out text); `loss` is on all of it, in nats per token."""

    name: str
    n_parameters: int
    precision: str
    tokens: int
    seconds: float
    loss: float
    bits_per_byte: float
    curve: list[tuple[float, float]]


def run(contestant: Contestant, held_out: Pieces, n_bytes: int, points: int) -> Result:
    curve = []
    for i in range(1, points + 1):
        while contestant.progress < i / points:
            start = time.perf_counter()
            contestant.tokens += contestant.update()
            contestant.seconds += time.perf_counter() - start
        curve.append((contestant.seconds, evaluate(contestant, held_out[:4])))
        print(f"{contestant.name}: {curve[-1][0]:7.1f} s   loss {curve[-1][1]:.4f}", flush=True)
    loss = evaluate(contestant, held_out)
    n_targets = sum(targets.numel() for _, targets in held_out)
    return Result(
        name=contestant.name,
        n_parameters=count(contestant.model),
        precision=contestant.precision,
        tokens=contestant.tokens,
        seconds=contestant.seconds,
        loss=loss,
        bits_per_byte=loss * n_targets / math.log(2) / n_bytes,
        curve=curve,
    )


@torch.no_grad()
def evaluate(contestant: Contestant, held_out: Pieces) -> float:
    """Nats per token."""
    contestant.model.eval()
    total = sum(contestant.loss(*rows).item() * rows[1].numel() for rows in held_out)
    contestant.model.train()
    return total / sum(targets.numel() for _, targets in held_out)


def pieces(dataset: Dataset, context: int) -> Pieces:
    """All held-out text in pieces of at most `context`, those of one length together, the longest first."""
    rows = PackedBatches(dataset.validation, context=context, batch_size=1, seed=0, shuffle=False)
    by_length: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for row in (rows.batch(0, i) for i in range(len(rows))):
        lengths = torch.bincount(row.tokens.segment[0])[1:].tolist()
        width = sum(lengths)
        inputs, targets = row.inputs[0, :width].split(lengths), row.targets[0, :width].split(lengths)
        for length, piece in zip(lengths, zip(inputs, targets, strict=True), strict=True):
            by_length[length].append(piece)
    return [
        (torch.stack([x for x, _ in some]), torch.stack([y for _, y in some]))
        for _, same in sorted(by_length.items(), reverse=True)
        for some in (same[i : i + 16] for i in range(0, len(same), 16))
    ]


# --- report -----------------------------------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    lines = [
        "| contestant | parameters | precision | seconds | tokens | held-out loss | bits per byte |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.name} | {r.n_parameters:,} | {r.precision} | {r.seconds:.0f} | {r.tokens:,} | {r.loss:.4f} "
        f"| {r.bits_per_byte:.4f} |"
        for r in sorted(results, key=lambda r: r.loss)
    ]
    return "\n".join(lines)


def plot(results: list[Result], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for r in results:
        axes.plot(*zip(*r.curve, strict=True), marker="o", markersize=3, label=r.name)
    axes.set(xlabel="seconds of training", ylabel="held-out loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("shakespeare"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a change to the recipe")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3], help="learning rates of the peer")
    parser.add_argument("--points", type=int, default=10, help="evaluations on the way")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    options = parser.parse_args()
    keep_pages()
    recipe = read_recipe(options.recipe, options.set)
    task = recipe.data.prepare()
    dataset = task.dataset
    n_bytes = dataset.validation.n_bytes
    if dataset.tokenizer is None or n_bytes is None:
        sys.exit(f"{options.recipe}: its data are vectors; choose a recipe for text")
    held_out = pieces(dataset, recipe.context)
    trainer = Trainer(recipe.resolved(task), task)
    shape = matching_shape(trainer.model, dataset.tokenizer.vocab_size, recipe.context)
    results = [run(Ours(trainer), held_out, n_bytes, options.points)]
    for lr in options.lr:
        peer = Nano(shape, recipe, dataset.train.values, lr, budget=results[0].seconds)
        results.append(run(peer, held_out, n_bytes, options.points))
    print(f"\n{table(results)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
