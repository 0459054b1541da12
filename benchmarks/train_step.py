"""A training step of qkv and of its peers, in turn, each in a process of its own.

    python benchmarks/train_step.py --peers qkv huggingface --shape gpt2 smollm2 --dtype float32 bfloat16

For every shape and dtype all contestants are built side by side and take turns, one step each while the others sleep,
in an order shuffled anew every round: whatever else the machine does hits all of them alike. A step is forward,
backward, fused AdamW and `zero_grad`, on the same random tokens; "bfloat16" means weights, gradients and optimiser
states in bfloat16 for everybody, and a loss in float32. Each process asks its allocator for what its library's own
trainer asks for: qkv's keeps its pages, the peers' say nothing (`--malloc keep` gives all the same).
"""

import argparse
import gc
import importlib.metadata
import itertools
import json
import math
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import peers
from peers.shapes import SHAPES, Shape
from qkv.training.memory import keep_pages

WARM_UP = 2
"""Untimed steps: the first one compiles, and creates the optimiser's states."""

ANSWER = "answer: "
"""How a line begins that a worker writes for the process that started it."""

PACKAGES = {"huggingface": "transformers", "x_transformers": "x-transformers", "litgpt": "litgpt"}


class Contestant:
    """One library's model, with the training step that is the same for all."""

    def __init__(self, name: str, mode: str, shape: Shape, dtype: torch.dtype) -> None:
        self.name, self.mode = name, mode
        self.model = peers.build(name, shape)
        self.n_parameters = sum(p.numel() for p in self.model.parameters())
        if abs(self.n_parameters / shape.n_parameters - 1) > 0.01:
            sys.exit(f"{name}: {self.n_parameters:,} parameters, but the shape has {shape.n_parameters:,}")
        self._draw_weights()
        self.model.to(dtype).train()
        if mode == "compiled":
            self.model.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def _draw_weights(self) -> None:
        """All libraries start from the same distribution, so that their first losses can be compared."""
        torch.manual_seed(0)
        for weight in self.model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.02)

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One step of training; returns the loss before it."""
        loss = self.model(inputs, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Worker:
    """A contestant in a process of its own, which makes a step when it is told to.

    Attributes:
        facts: What it knows after its warm-up: `n_parameters` and `first_loss`.
    """

    def __init__(self, name: str, mode: str, shape: str, dtype: str, options: argparse.Namespace) -> None:
        self.name, self.mode = name, mode
        note(f"warming up {name} {mode}")
        flags = ["--peers", name, "--mode", mode, "--shape", shape, "--dtype", dtype, "--work"]
        flags += ["--batch-size", str(options.batch_size), "--length", str(options.length), "--malloc", options.malloc]
        command = [sys.executable, __file__, *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self.ask(None)

    def ask(self, request: str | None) -> Any:
        """Send a request, "step" or "memory", and wait for what comes back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if request is not None:
            print(request, file=self._process.stdin, flush=True)
        while answer := self._process.stdout.readline():
            if answer.startswith(ANSWER):  # libraries print, too
                return json.loads(answer.removeprefix(ANSWER))
        sys.exit(f"{self.name} {self.mode}: failed; the cause is above")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def work(options: argparse.Namespace) -> None:
    """What a worker's process does: it warms up, then answers one line with one line."""

    def answer(value: object) -> None:
        print(f"{ANSWER}{json.dumps(value)}", flush=True)

    name, mode, shape = options.peers[0], options.mode[0], SHAPES[options.shape[0]]
    if options.malloc == "keep" or (options.malloc == "own" and name == "qkv"):
        keep_pages()
    peers.build(name, SHAPES["tiny" if shape.family == "gpt2" else "tiny-llama"])  # imports the library
    imports = in_bytes("/proc/self/status", "VmRSS")
    contestant = Contestant(name, mode, shape, getattr(torch, options.dtype[0]))
    data = batches(shape, options)
    loss = warm_up(contestant, shape, next(data))
    gc.collect()
    # Restart VmHWM from what is resident now, so that the compiler's own peak is not in it.
    Path("/proc/self/clear_refs").write_text("5")
    answer({"n_parameters": contestant.n_parameters, "first_loss": loss})
    for line in sys.stdin:
        if line.strip() == "memory":
            answer(in_bytes("/proc/self/status", "VmHWM") - imports)
            continue
        batch = next(data)
        start = time.perf_counter()
        contestant.step(*batch)
        answer(time.perf_counter() - start)


@dataclass
class Result:
    """What is known about one contestant after a match.

    Attributes:
        seconds: Of each step.
        tokens_per_second: At the median step.
        spread: Median distance of a step from the median step, as a share of it.
        ratio: Speed over that of the fastest peer, eager or compiled.
        memory: Peak during the steps (bytes), less what the imports take.
    """

    name: str
    mode: str
    n_parameters: int
    first_loss: float
    seconds: list[float]
    tokens_per_second: float
    spread: float
    ratio: float
    memory: int


def batches(shape: Shape, options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        size = (options.batch_size, options.length + 1)
        tokens = torch.randint(shape.vocab_size, size, generator=generator)
        yield tokens[:, :-1], tokens[:, 1:].contiguous()


def match(shape: str, dtype: str, options: argparse.Namespace) -> list[Result]:
    """All contestants on one shape and dtype."""
    entries = list(itertools.product(options.peers, options.mode))
    check_room(len(entries), SHAPES[shape], getattr(torch, dtype))
    workers = [Worker(*entry, shape, dtype, options) for entry in entries]
    seconds = race(workers, options.rounds)
    memory = [worker.ask("memory") for worker in workers]
    for worker in workers:
        worker.close()
    medians = [statistics.median(times) for times in seconds]
    best = min((m for m, w in zip(medians, workers, strict=True) if w.name != "qkv"), default=math.nan)
    return [
        Result(
            name=worker.name,
            mode=worker.mode,
            **worker.facts,
            seconds=seconds[i],
            tokens_per_second=options.batch_size * options.length / medians[i],
            spread=statistics.median(abs(t - medians[i]) for t in seconds[i]) / medians[i],
            ratio=best / medians[i],
            memory=memory[i],
        )
        for i, worker in enumerate(workers)
    ]


def warm_up(contestant: Contestant, shape: Shape, batch: tuple[Tensor, Tensor]) -> float:
    """Returns the first loss. On random tokens it is ln V plus half the variance of the logits, about 0.1 here."""
    losses = [contestant.step(*batch) for _ in range(WARM_UP)]
    if not -0.05 < losses[0] - math.log(shape.vocab_size) < 0.5:
        sys.exit(
            f"{contestant.name}: the first loss is {losses[0]:.3f}, far from ln V = {math.log(shape.vocab_size):.3f}"
        )
    return losses[0]


def race(workers: list[Worker], rounds: int) -> list[list[float]]:
    """Seconds of every step, for each contestant."""
    seconds: list[list[float]] = [[] for _ in workers]
    for i in range(rounds):
        note(f"round {i + 1} of {rounds}")
        for j in random.Random(i).sample(range(len(workers)), len(workers)):
            seconds[j].append(workers[j].ask("step"))
    return seconds


def in_bytes(path: str, field: str) -> int:
    """A field that the kernel states in kB."""
    lines = Path(path).read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def check_room(n: int, shape: Shape, dtype: torch.dtype) -> None:
    """Between steps a contestant keeps weights and optimiser states, and most of what a step took: few give it back."""
    each = 3 * shape.n_parameters * dtype.itemsize + (3 << 30)
    needed, free = n * each, in_bytes("/proc/meminfo", "MemAvailable")
    if needed > free:
        sys.exit(f"{n} contestants need {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free; fewer --peers or --mode")


# --- report -----------------------------------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    """Markdown, the fastest first."""
    lines = [
        "| contestant | mode | parameters | first loss | tokens/s | spread | ratio to best peer | peak memory |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.name} | {r.mode} | {r.n_parameters:,} | {r.first_loss:.3f} | {r.tokens_per_second:,.0f} "
        f"| {r.spread:.0%} | {r.ratio:.2f} | {r.memory / 1e9:.2f} GB |"
        for r in sorted(results, key=lambda r: -r.tokens_per_second)
    ]
    return "\n".join(lines)


def environment(options: argparse.Namespace) -> dict[str, str | int]:
    """What the figures depend on besides the code."""
    cpu = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    cpu = {key.strip(): value.strip() for key, value in cpu.items()}
    packages = ["torch", *(PACKAGES[name] for name in options.peers if name in PACKAGES)]
    try:
        versions = {name: importlib.metadata.version(name) for name in packages}
    except importlib.metadata.PackageNotFoundError as error:
        sys.exit(f"{error.name} is not installed; run `make bench`, or leave it out of --peers")
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "instructions": " ".join(
            sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & {*cpu.get("flags", "").split()})
        ),
        "threads": torch.get_num_threads(),
        "malloc": options.malloc,
        **versions,
    }


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["gpt2", "smollm2"])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--mode", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--peers", nargs="+", choices=peers.NAMES, default=["qkv", "huggingface"], help="who")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens in a row")
    parser.add_argument(
        "--malloc", choices=("own", "default", "keep"), default="own", help="keep: as `qkv train` sets it, for all"
    )
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1 or options.length > min(SHAPES[shape].context for shape in options.shape):
        parser.error("--rounds must be at least 1, and --length at most the shape's context")
    if options.work:
        return work(options)
    facts = environment(options)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    matches = []
    for shape, dtype in itertools.product(options.shape, options.dtype):
        results = match(shape, dtype, options)
        print(f"\n{shape}, {dtype}, {options.batch_size} x {options.length} tokens\n\n{table(results)}", flush=True)
        matches.append({"shape": shape, "dtype": dtype, "results": [asdict(result) for result in results]})
    if options.json:
        options.json.write_text(json.dumps({"environment": facts, "matches": matches}, indent=2) + "\n")


if __name__ == "__main__":
    main()
