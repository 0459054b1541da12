"""A training step of qkv and of its peers, interleaved in one process.

    python benchmarks/train_step.py --shape gpt2 smollm2 --dtype float32 bfloat16 --mode eager compiled --json out.json

For every shape and dtype all contestants are built side by side and take turns, one step each, in an order shuffled
anew every round: whatever else the machine does hits all of them alike. A step is forward, backward, fused AdamW and
`zero_grad`, on the same random tokens; "bfloat16" means weights, gradients and optimiser states in bfloat16 for
everybody, and a loss in float32. Peak memory is measured for each contestant alone, in a process of its own.
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

import torch
from torch import Tensor

import peers
from peers.shapes import SHAPES, Shape
from qkv.training.memory import keep_pages

WARM_UP = 2
"""Untimed steps: the first one compiles, and creates the optimiser's states."""

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


@dataclass
class Result:
    """What is known about one contestant after a match.

    Attributes:
        seconds: Of each step.
        tokens_per_second: At the median step.
        spread: Median distance of a step from the median step, as a share of it.
        ratio: Speed over that of the fastest peer, eager or compiled.
        memory: Peak (bytes).
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


def match(shape_name: str, dtype_name: str, options: argparse.Namespace) -> list[Result]:
    """All contestants on one shape and dtype."""
    shape, dtype = SHAPES[shape_name], getattr(torch, dtype_name)
    entries = list(itertools.product(options.peers, options.mode))
    check_room(len(entries), shape, dtype)
    memory = [memory_alone(*entry, shape_name, dtype_name, options) for entry in entries]
    contestants = [Contestant(*entry, shape, dtype) for entry in entries]
    data = batches(shape, options)
    first = next(data)
    losses = [warm_up(contestant, shape, first) for contestant in contestants]
    seconds = race(contestants, data, options.rounds)
    medians = [statistics.median(times) for times in seconds]
    best = min((m for m, c in zip(medians, contestants, strict=True) if c.name != "qkv"), default=math.nan)
    return [
        Result(
            name=contestant.name,
            mode=contestant.mode,
            n_parameters=contestant.n_parameters,
            first_loss=losses[i],
            seconds=seconds[i],
            tokens_per_second=options.batch_size * options.length / medians[i],
            spread=statistics.median(abs(t - medians[i]) for t in seconds[i]) / medians[i],
            ratio=best / medians[i],
            memory=memory[i],
        )
        for i, contestant in enumerate(contestants)
    ]


def warm_up(contestant: Contestant, shape: Shape, batch: tuple[Tensor, Tensor]) -> float:
    """Returns the first loss. On random tokens it is ln V plus half the variance of the logits, about 0.1 here."""
    note(f"warming up {contestant.name} {contestant.mode}")
    losses = [contestant.step(*batch) for _ in range(WARM_UP)]
    if not -0.05 < losses[0] - math.log(shape.vocab_size) < 0.5:
        sys.exit(
            f"{contestant.name}: the first loss is {losses[0]:.3f}, far from ln V = {math.log(shape.vocab_size):.3f}"
        )
    return losses[0]


def race(contestants: list[Contestant], data: Iterator[tuple[Tensor, Tensor]], rounds: int) -> list[list[float]]:
    """Seconds of every step, for each contestant."""
    seconds: list[list[float]] = [[] for _ in contestants]
    for i in range(rounds):
        note(f"round {i + 1} of {rounds}")
        batch = next(data)
        gc.collect()
        for j in random.Random(i).sample(range(len(contestants)), len(contestants)):
            start = time.perf_counter()
            contestants[j].step(*batch)
            seconds[j].append(time.perf_counter() - start)
    return seconds


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_alone(name: str, mode: str, shape: str, dtype: str, options: argparse.Namespace) -> int:
    """Peak resident bytes of training steps in a fresh process, less what the imports take."""
    note(f"memory of {name} {mode}")
    flags = ["--peers", name, "--mode", mode, "--shape", shape, "--dtype", dtype, "--alone"]
    flags += ["--batch-size", str(options.batch_size), "--length", str(options.length), "--malloc", options.malloc]
    run = subprocess.run([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True)
    if run.returncode:
        sys.exit(f"{name} {mode}: failed; the cause is above")
    return int(run.stdout.splitlines()[-1])


def alone(options: argparse.Namespace) -> None:
    """What `memory_alone` runs. The peak counts from after the warm-up, so that the compiler's own is not in it."""
    shape, dtype = SHAPES[options.shape[0]], getattr(torch, options.dtype[0])
    peers.build(options.peers[0], SHAPES["tiny" if shape.family == "gpt2" else "tiny-llama"])  # imports the library
    imports = in_bytes("/proc/self/status", "VmRSS")
    contestant = Contestant(options.peers[0], options.mode[0], shape, dtype)
    data = batches(shape, options)
    warm_up(contestant, shape, next(data))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # restart VmHWM from what is resident now
    for _ in range(2):
        contestant.step(*next(data))
    print(in_bytes("/proc/self/status", "VmHWM") - imports)


def in_bytes(path: str, field: str) -> int:
    """A field that the kernel states in kB."""
    lines = Path(path).read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def check_room(n: int, shape: Shape, dtype: torch.dtype) -> None:
    """Between steps a contestant keeps weights and two optimiser states; one at a time works with more."""
    needed = (3 * n + 1) * shape.n_parameters * dtype.itemsize + (4 << 30)
    free = in_bytes("/proc/meminfo", "MemAvailable")
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
    parser.add_argument("--peers", nargs="+", choices=peers.NAMES, default=list(peers.NAMES), help="who takes part")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens in a row")
    parser.add_argument(
        "--malloc", choices=("default", "keep"), default="default", help="keep: as `qkv train` sets it, for all"
    )
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1 or options.length > min(SHAPES[shape].context for shape in options.shape):
        parser.error("--rounds must be at least 1, and --length at most the shape's context")
    if options.malloc == "keep" and not keep_pages():
        sys.exit("--malloc keep needs glibc; leave it out")
    if options.alone:
        return alone(options)
    facts = environment(options)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    matches = []
    for shape, dtype in itertools.product(options.shape, options.dtype):
        results = match(shape, dtype, options)
        print(f"\n{shape}, {dtype}, {options.batch_size} x {options.length} tokens\n\n{table(results)}", flush=True)
        matches.append({"shape": shape, "dtype": dtype, "results": [asdict(result) for result in results]})
        torch.compiler.reset()
    if options.json:
        options.json.write_text(json.dumps({"environment": facts, "matches": matches}, indent=2) + "\n")


if __name__ == "__main__":
    main()
