"""Time and memory of attention over the length of the text, for each backend that can do it.

    python benchmarks/attention.py --json attention.json --plot attention.png

8 heads of 64, one row, float32. Time: forward and backward, contestants in turn, medians. Memory: peak of forward and
backward beyond what was resident before, each in a process of its own, and the exponent of its growth with the length.
FlexAttention stands beside them with what it can on a CPU: a compiled forward pass.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qkv.lowered import Form, LoweredMask, lower
from qkv.masks import Causal, Mask, Window
from qkv.ops import attend
from qkv.tokens import Tokens

HEADS, WIDTH, WINDOW, DOCUMENT = 8, 64, 256, 256
CASES = ("causal", "window", "documents")


def mask_of(case: str, n: int) -> LoweredMask:
    full = Tokens.full(1, n)
    if case == "documents":
        packed = Tokens.packed([[DOCUMENT] * (n // DOCUMENT)])
        return lower(Causal(), packed, packed)
    mask: Mask = Causal() if case == "causal" else Causal() & Window(size=WINDOW)
    return lower(mask, full, full)


def inputs(n: int) -> list[Tensor]:
    torch.manual_seed(0)
    # In memory as a projection leaves them: the heads of a token side by side.
    return [torch.randn(1, n, HEADS, WIDTH).transpose(1, 2).requires_grad_() for _ in range(3)]


def step(case: str, backend: str, n: int) -> Callable[[], None]:
    """Forward and backward."""
    qkv, mask = inputs(n), mask_of(case, n)
    if backend == "dense":
        mask, backend = replace(mask, form=Form.DENSE), "sdpa"
        _ = mask.dense

    def run() -> None:
        out = attend(*qkv, mask=mask, backend=backend)
        out.backward(torch.ones_like(out))
        for x in qkv:
            x.grad = None

    return run


def flex(n: int) -> Callable[[], None]:
    """FlexAttention's compiled forward pass with the window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    qkv = [x.detach() for x in inputs(n)]
    block = create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < WINDOW), None, None, n, n, device="cpu")
    compiled = torch.compile(flex_attention)
    return lambda: compiled(*qkv, block_mask=block)


def forward(case: str, backend: str, n: int) -> Callable[[], None]:
    qkv, mask = [x.detach() for x in inputs(n)], mask_of(case, n)
    return lambda: attend(*qkv, mask=mask, backend=backend)


def in_turn(contestants: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def alone(case: str, backend: str, n: int) -> None:
    """Print the bytes of a forward and backward pass, beyond what is resident before."""
    step(case, backend, 256)()
    run = step(case, backend, n)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    print(resident("VmHWM") - before)


def memory(case: str, backend: str, n: int) -> int:
    command = [sys.executable, __file__, "--alone", case, backend, str(n)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of a straight line through the logarithms."""
    x, y = [math.log(n) for n in sizes], [math.log(v) for v in values]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def times(sizes: list[int], rounds: int) -> dict[str, dict[int, float]]:
    """Seconds of forward and backward."""
    found: dict[str, dict[int, float]] = {}
    for n in sizes:
        contestants = {
            "causal: sdpa": step("causal", "sdpa", n),
            "causal: tiled": step("causal", "tiled", n),
            "window: tiled": step("window", "tiled", n),
            "documents: documents": step("documents", "documents", n),
            "documents: tiled": step("documents", "tiled", n),
            "documents: dense mask": step("documents", "dense", n),
        }
        for name, seconds in in_turn(contestants, rounds).items():
            found.setdefault(name, {})[n] = seconds
    return found


def plot(seconds: dict[str, dict[int, float]], peaks: dict[str, dict[int, int]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, data, label, unit in ((left, seconds, "seconds", 1.0), (right, peaks, "MB", 1e6)):
        for name, points in data.items():
            axes.plot(list(points), [v / unit for v in points.values()], marker="o", markersize=3, label=name)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"{label}, forward and backward")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        case, backend, n = options.alone
        return alone(case, backend, int(n))
    seconds = times(options.sizes, options.rounds)
    names = {name: tuple(name.replace("dense mask", "dense").split(": ")) for name in seconds}
    peaks = {name: {n: memory(*pair, n) for n in options.sizes} for name, pair in names.items()}
    print(
        "| forward and backward | "
        + " | ".join(f"{n:,}" for n in options.sizes)
        + " | memory at the longest | exponent |"
    )
    print("|---|" + "---:|" * (len(options.sizes) + 2))
    for name, points in seconds.items():
        growth = exponent(options.sizes, [float(v) for v in peaks[name].values()])
        cells = " | ".join(f"{points[n]:.3f} s" for n in options.sizes)
        print(f"| {name} | {cells} | {peaks[name][options.sizes[-1]] / 1e6:.0f} MB | {growth:.2f} |")
    n = options.sizes[-1]
    last = {name: points[n] for name, points in seconds.items()}
    window = last["causal: sdpa"] / last["window: tiled"]
    documents = last["documents: dense mask"] / last["documents: documents"]
    print(f"\nat {n:,} tokens: a window of {WINDOW} is {window:.1f} times faster than causal SDPA,")
    print(
        f"documents of {DOCUMENT} {documents:.1f} times faster than through a dense mask; causal tiled takes", end=" "
    )
    print(f"{last['causal: tiled'] / last['causal: sdpa']:.2f} times as long as SDPA")
    start = time.perf_counter()
    peer = flex(n)
    peer()
    built = time.perf_counter() - start
    passes = in_turn(
        {"flex": peer, "tiled": forward("window", "tiled", n), "sdpa": forward("causal", "sdpa", n)}, options.rounds
    )
    print(
        f"forward alone, window: FlexAttention {passes['flex']:.3f} s (and {built:.1f} s to build and compile), tiled ",
        end="",
    )
    print(f"{passes['tiled']:.3f} s; causal SDPA {passes['sdpa']:.3f} s")
    if options.json:
        options.json.write_text(json.dumps({"seconds": seconds, "bytes": peaks, "forward": passes}, indent=2) + "\n")
    if options.plot:
        plot(seconds, peaks, options.plot)


if __name__ == "__main__":
    main()
