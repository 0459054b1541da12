"""Padded rows, forward and backward: taking the documents apart against a mask, over the length of the rows.

    python benchmarks/short_rows.py

Where the one begins to win over the other is `SHORT` in `qkv.lowered`.
"""

import statistics
import time

import torch

from qkv.lowered import SHORT, lower
from qkv.masks import Causal
from qkv.ops.attend import solve
from qkv.ops.backend import Problem
from qkv.tokens import Tokens

HEADS, WIDTH, TOKENS = 4, 64, 4096
BACKENDS = ("documents", "sdpa")


def once(problem: Problem, backend: str) -> float:
    """Seconds of a forward and backward pass."""
    before = time.perf_counter()
    solve(problem, backend=backend).sum().backward()
    return time.perf_counter() - before


def main() -> None:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    print(f"SHORT is {SHORT}; medians of 15, in turn, rows a third to wholly full, {TOKENS} places in all\n")
    print("| tokens a row | documents ms | mask ms | ratio |\n|---:|---:|---:|---:|")
    for n in (16, 32, 64, 128, 256, 512, 1024):
        rows = TOKENS // n
        lengths = [n, *torch.randint(n // 3, n + 1, (rows - 1,), generator=generator).tolist()]
        tokens = Tokens.padded(lengths, n)
        q, k, v = (torch.randn(rows, HEADS, n, WIDTH, requires_grad=True) for _ in range(3))
        problem = Problem(q, k, v, lower(Causal(), tokens, tokens), WIDTH**-0.5)
        times: dict[str, list[float]] = {name: [] for name in BACKENDS}
        for _ in range(17):
            for name in BACKENDS:
                times[name].append(once(problem, name))
        apart, mask = (1e3 * statistics.median(times[name][2:]) for name in BACKENDS)
        print(f"| {n} | {apart:.1f} | {mask:.1f} | {apart / mask:.2f} |", flush=True)


if __name__ == "__main__":
    main()
