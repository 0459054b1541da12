"""float32 or bfloat16 products, chosen by timing rather than by belief."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, cast

import torch

Precision = Literal["float32", "bfloat16"]


def products_in(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products run in that type; weights, norms, softmax and loss stay float32."""
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def fastest(step: Callable[[Precision], object], rounds: int = 3) -> tuple[Precision, dict[Precision, float]]:
    """The faster precision for `step`, and the median seconds of each; interleaved, after one round to warm up.

    Fewer rounds where the difference is plain; not even a second one where steps take long.
    """
    names: tuple[Precision, Precision] = ("float32", "bfloat16")
    seconds: dict[Precision, list[float]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name in names:
            start = time.perf_counter()
            step(name)
            seconds[name].append(time.perf_counter() - start)
        low, high = sorted(times[-1] for times in seconds.values())
        if high > 1.5 * low and (len(seconds["float32"]) > 1 or low > 3):
            break
    medians: dict[Precision, float] = {name: statistics.median(times[1:] or times) for name, times in seconds.items()}
    return min(names, key=medians.__getitem__), medians


def matmul_peak(precision: str, device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product, the best of a few: what this machine can do."""
    n = 1536 if device.type == "cpu" else 8192
    dtype = cast(torch.dtype, getattr(torch, precision))
    numbers = torch.Generator(device).manual_seed(0)  # of its own: dropout must not depend on this
    a, b = (torch.randn(n, n, device=device, generator=numbers).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # reading a number waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
