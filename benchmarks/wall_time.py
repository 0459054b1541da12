"""A recipe of qkv against a nanoGPT-style loop: the same corpus, tokens, size and wall time.

    python benchmarks/wall_time.py --json wall_time.json --plot wall_time.png

The recipe runs as it is. The peer then gets as many seconds as that took, once for each `--lr`, and its best run counts.
Each has the whole machine, one after the other; seconds are those of training, without evaluation. The peer is a GPT-2
with as many parameters, trained as nanoGPT does: random crops of one long stream of tokens, AdamW, 2 % warm-up, a cosine
down to a tenth, no dropout. Its schedule follows the clock, so that it ends with its time. It chooses its precision as
qkv does, by timing, and both are evaluated in float32, on the same pieces of held-out text.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from peers.nano import GPT
from peers.shapes import Shape
from qkv.data import Batches, Dataset, prepare
from qkv.training import RecipeConfig, read_recipe
from qkv.training.memory import keep_pages
from qkv.training.precision import fastest, products_in
from qkv.training.trainer import Trainer

CPU = torch.device("cpu")
Pieces = list[tuple[Tensor, Tensor]]


class Contestant(Protocol):
    """What the clock needs to know."""

    name: str
    model: nn.Module
    precision: str
    tokens: int

    def update(self, seconds: float) -> None:
        """One step of training, `seconds` after the start."""
        ...

    def progress(self, seconds: float) -> float:
        """The share that is done; training ends at 1."""
        ...

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss on full rows."""
        ...


class Ours:
    """The recipe, in qkv's own trainer."""

    def __init__(self, recipe: RecipeConfig, dataset: Dataset) -> None:
        self.name = "qkv"
        self.trainer = Trainer(recipe, dataset)
        self.trainer.choose_precision()
        self.model = self.trainer.model
        self.precision = self.trainer.recipe.precision
        self.tokens = 0

    def update(self, seconds: float) -> None:
        _, _, _, count = self.trainer._update()
        self.tokens += count

    def progress(self, seconds: float) -> float:
        return self.trainer.step / self.trainer.recipe.steps

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.trainer.model.loss(inputs, targets)[0]


class Nano:
    """nanoGPT's loop, for `budget` seconds."""

    def __init__(self, shape: Shape, recipe: RecipeConfig, dataset: Dataset, lr: float, budget: float) -> None:
        self.name = f"nano, lr {lr:g}"
        self.lr, self.budget, self.tokens = lr, budget, 0
        self.size = (recipe.batch_size, recipe.context)
        self.stream = dataset.train.values
        self.random = np.random.default_rng(recipe.seed)
        torch.manual_seed(recipe.seed)
        self.model = GPT(shape)
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)
        self.precision, _ = fastest(self._gradients)
        self.optimizer.zero_grad()

    def _gradients(self, precision: str) -> None:
        rows, length = self.size
        starts = self.random.integers(0, len(self.stream) - length, rows)
        crops = torch.from_numpy(np.stack([self.stream[i : i + length + 1] for i in starts]).astype(np.int64))
        with autocast(precision):
            loss = self.model(crops[:, :-1], crops[:, 1:])
        loss.backward()

    def update(self, seconds: float) -> None:
        done = self.progress(seconds)
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(cosine, (done + 1e-3) / 0.02)
        self._gradients(self.precision)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens += math.prod(self.size)

    def progress(self, seconds: float) -> float:
        return seconds / self.budget

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.model(inputs, targets)


def autocast(precision: str) -> AbstractContextManager[object]:
    return products_in(precision, CPU)


def matching_shape(recipe: RecipeConfig, model: nn.Module, n_layers: int) -> Shape:
    """The GPT-2 of the same depth and vocabulary whose number of parameters is nearest."""
    wanted = sum(p.numel() for p in model.parameters())
    vocab_size = recipe.model.embed.vocab_size

    def shape(d: int) -> Shape:
        n = (vocab_size + recipe.context) * d + n_layers * (12 * d * d + 13 * d) + 2 * d
        return Shape("gpt2", d, n_layers, d // 64, d // 64, 4 * d, vocab_size, recipe.context, n)

    return min(map(shape, range(64, 4096, 64)), key=lambda s: abs(s.n_parameters - wanted))


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
    seconds, curve = 0.0, []
    for i in range(1, points + 1):
        while contestant.progress(seconds) < i / points:
            start = time.perf_counter()
            contestant.update(seconds)
            seconds += time.perf_counter() - start
        curve.append((seconds, evaluate(contestant, held_out[:4])))
        print(f"{contestant.name}: {curve[-1][0]:7.1f} s   loss {curve[-1][1]:.4f}", flush=True)
    loss = evaluate(contestant, held_out)
    n_targets = sum(targets.numel() for _, targets in held_out)
    return Result(
        name=contestant.name,
        n_parameters=sum(p.numel() for p in contestant.model.parameters()),
        precision=contestant.precision,
        tokens=contestant.tokens,
        seconds=seconds,
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
    rows = Batches(dataset.validation, context=context, batch_size=1, seed=0, shuffle=False)
    by_length: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for row in (rows.batch(0, i) for i in range(len(rows))):
        lengths = row.lengths[0]
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
    dataset = prepare(recipe.data)
    recipe = recipe.resolved(dataset)
    held_out, n_bytes = pieces(dataset, recipe.context), dataset.validation.n_bytes
    ours = Ours(recipe, dataset)
    shape = matching_shape(recipe, ours.model, len(ours.model.blocks))
    results = [run(ours, held_out, n_bytes, options.points)]
    if abs(shape.n_parameters / results[0].n_parameters - 1) > 0.02:
        raise SystemExit(f"no GPT-2 has {results[0].n_parameters:,} parameters within 2 %; choose another recipe")
    for lr in options.lr:
        peer = Nano(shape, recipe, dataset, lr, budget=results[0].seconds)
        results.append(run(peer, held_out, n_bytes, options.points))
    print(f"\n{table(results)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
