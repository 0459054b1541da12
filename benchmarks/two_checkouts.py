"""Two checkouts of qkv in turn: a training step, reading a prompt, decoding. Is one slower than the other?

    git worktree add ../before COMMIT
    python benchmarks/two_checkouts.py ../before .

Each checkout has its own process, which imports qkv from its `src`. They take turns, one measurement each while the
other sleeps, in a random order each round. Only what both have is used: configs, `model.loss`, caches.
"""

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CASES = ("step", "ragged step", "windowed step", "translator step", "prompt", "decode 1", "decode 8")


def main() -> None:
    """Print the median of each case in each checkout, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    checkouts = [arguments.before.resolve(), arguments.after.resolve()]
    print(f"{_processor()}, {os.cpu_count()} cores; {arguments.rounds} rounds, medians")
    print(f"{'case':<16}{'before':>12}{'after':>12}{'before/after':>15}{'spread':>9}")
    for case in arguments.cases:
        times = _measure(checkouts, case, arguments.rounds)
        before, after = (statistics.median(each) for each in times)
        quarters = statistics.quantiles([a / b for a, b in zip(*times, strict=True)], n=4)
        spread = (quarters[2] - quarters[0]) / 2
        print(
            f"{case:<16}{before * 1e3:>9.1f} ms{after * 1e3:>9.1f} ms{before / after:>15.3f}{spread:>9.3f}", flush=True
        )


def _measure(checkouts: list[Path], case: str, rounds: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in checkouts]
    with _worker(checkouts[0], case) as first, _worker(checkouts[1], case) as second:
        workers = [first, second]
        for _ in range(rounds):
            for i in random.sample(range(2), 2):
                times[i].append(workers[i]())
    return times


@contextmanager
def _worker(checkout: Path, case: str) -> Iterator[Callable[[], float]]:
    """A process that waits; each call makes it run the case once, and gives the seconds."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    command = [sys.executable, __file__, "--worker", case]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    source = process.stdout.readline().strip()
    if not source.startswith(str(checkout)):
        sys.exit(f"{checkout}: qkv was imported from {source or 'nowhere'}; give a checkout with src/qkv")

    def once() -> float:
        process.stdin.write("go\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    yield once
    process.stdin.close()
    process.wait()


def _work(case: str) -> None:
    """What the process of a checkout does."""
    import qkv

    run = _prepare(case)
    run()
    run()
    print(Path(qkv.__file__).resolve(), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        run()
        print(time.perf_counter() - began, flush=True)


def _config(mask: object) -> object:
    import qkv

    attention = qkv.AttentionConfig(n_heads=4, n_kv_heads=2, mask=mask, position=qkv.RoPEConfig())
    block = qkv.PreNormConfig(norm=qkv.RMSNormConfig(), sublayers=(attention, qkv.GLUConfig()))
    return qkv.TransformerConfig(
        d_model=256,
        embed=qkv.TokenEmbedderConfig(vocab_size=2048),
        blocks=qkv.Repeat(n=6, pattern=block),
        final_norm=qkv.RMSNormConfig(),
        head=qkv.LMHeadConfig(),
    )


def _prepare(case: str) -> Callable[[], object]:
    import torch

    from qkv import Causal, Tokens, Window

    torch.manual_seed(0)
    if case == "translator step":
        return _translator()
    mask = Causal() & Window(size=64) if case == "windowed step" else Causal()
    model = _config(mask).build()
    if case.startswith("decode"):
        return _decoding(model, rows=int(case.split()[1]))
    rows, width = (1, 1024) if case == "prompt" else (4, 256)
    if case == "windowed step":
        rows, width = 1, 2048
    ids = torch.randint(0, 2048, (rows, width + 1))
    if case == "prompt":
        model.eval()

        def read() -> object:
            with torch.inference_mode():
                return model(ids[:, :-1], cache=model.make_cache(rows, width))

        return read
    cuts = [[40, 100, 30, 86]] * (rows // 2) + [[200, 20]] * (rows // 2)
    tokens = Tokens.packed(cuts, width) if case == "ragged step" else None
    return _training(model, lambda: model.loss(ids[:, :-1], ids[:, 1:], tokens))


def _training(model: object, loss: Callable[[], tuple]) -> Callable[[], object]:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss()[0].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _translator() -> Callable[[], object]:
    import torch

    from qkv import Pair, Tokens
    from qkv.presets.translators import PAIR_PRESETS

    model = PAIR_PRESETS["translator"]().with_vocabularies(500, 500, shared=False).build()
    lengths = [int(n) for n in torch.randint(8, 33, (32,))]
    source, target = torch.randint(0, 500, (32, max(lengths))), torch.randint(0, 500, (32, 33))
    pair = Pair(source, Tokens.padded(lengths, max(lengths)), target[:, :-1])
    return _training(model, lambda: model.loss(pair, target[:, 1:]))


def _decoding(model: object, rows: int) -> Callable[[], object]:
    from qkv import SamplingConfig
    from qkv.generation import generate

    sampling, prompts = SamplingConfig(temperature=0.0), [list(range(1, 40 + 5 * i)) for i in range(rows)]
    return lambda: list(generate(model, prompts, max_new_tokens=64, sampling=sampling))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _work(sys.argv[2])
    else:
        main()
