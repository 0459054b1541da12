"""How long `qkv --help` and `import qkv` take, beside a bare Python and `import torch`. Rounds are interleaved."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 20
COMMANDS = {
    "qkv --help": [str(Path(sys.executable).parent / "qkv"), "--help"],
    "import qkv": [sys.executable, "-c", "import qkv"],
    "import torch": [sys.executable, "-c", "import torch"],
    "python": [sys.executable, "-c", ""],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS + 1):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    print(f"| command | best of {ROUNDS} | median |\n|---|---:|---:|")
    for name, (_, *warm) in times.items():  # the first one reads the files from disk
        print(f"| `{name}` | {min(warm) * 1e3:.0f} ms | {statistics.median(warm) * 1e3:.0f} ms |")


if __name__ == "__main__":
    main()
