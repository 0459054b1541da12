"""Prompts read and tokens written per second, on SmolLM2-135M in four bits, beside Hugging Face and llama.cpp.

    python benchmarks/decode.py
    python benchmarks/decode.py --contestants qkv huggingface:compiled --batch 1
    python benchmarks/decode.py --contestants qkv llama.cpp

Every contestant reads the same GGUF file in a process of its own and takes turns with the others: 128 random tokens of
prompt, then 128 tokens, greedy, nothing stops earlier. "first token" is the time to read the prompts; decoding is
what the other 127 tokens take. Contestants:

- `qkv`: four-bit weights stay packed (the default); `qkv:float32` expands them, `qkv:int8` packs those to eight bits
- `huggingface`, `huggingface:bfloat16`, `huggingface:compiled`: `generate` on expanded weights
- `llama.cpp`: through the package cyllama, where it is installed. Its wheels hold a build for AVX2, which uses neither
  AVX-512 nor AMX

"limit" is how many tokens a second the memory would allow at batch 1: its measured bandwidth over the bytes of weights
that one token needs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from abc import ABC, abstractmethod
from pathlib import Path

import torch

CONTESTANTS = ("qkv", "qkv:float32", "huggingface", "huggingface:bfloat16")
TOKENS = 128


class Contestant(ABC):
    """A model that is loaded once and asked again and again."""

    def __init__(self, path: Path, mode: str) -> None:
        self.path, self.mode = path, mode

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes of weights that a decoding step reads."""

    @abstractmethod
    def write(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        """`n` tokens after each prompt, greedy."""


class Qkv(Contestant):
    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        import qkv

        options = {"float32": {"dtype": torch.float32}, "int8": {}}.get(mode, {})
        self.model = qkv.load(path, **options).model
        if mode == "int8":
            from qkv.nn.quantised import quantise

            self.model = qkv.load(path, dtype=torch.float32).model
            quantise(self.model, "int8")

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in (*self.model.parameters(), *self.model.buffers()))

    def write(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        from qkv import SamplingConfig, generate

        steps = generate(self.model, prompts, max_new_tokens=n, sampling=SamplingConfig(temperature=0))
        return [list(row) for row in zip(*(step.ids for step in steps), strict=True)]


class HuggingFace(Contestant):
    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        import transformers

        dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, local_files_only=True
        ).eval()

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())

    def write(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        options = {"cache_implementation": "static"} if self.mode == "compiled" else {}
        if self.mode == "compiled":
            from transformers import CompileConfig

            options["compile_config"] = CompileConfig(fullgraph=True, mode="default")
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False,
                pad_token_id=0, **options,
            )  # fmt: skip
        return out[:, ids.shape[1] :].tolist()


class LlamaCpp(Contestant):
    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        from cyllama.llama import llama_cpp

        self.api = llama_cpp
        llama_cpp.ggml_backend_load_all()
        llama_cpp.disable_logging()
        self.model = llama_cpp.LlamaModel(str(path), llama_cpp.LlamaModelParams())
        self.sampler = llama_cpp.LlamaSampler(llama_cpp.LlamaSamplerChainParams())
        self.sampler.add_greedy()

    @property
    def weight_bytes(self) -> int:
        return self.path.stat().st_size

    def write(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        params = self.api.LlamaContextParams()
        params.n_ctx, params.n_batch, params.n_seq_max = 2 * TOKENS * len(prompts), TOKENS * len(prompts), len(prompts)
        params.n_threads = params.n_threads_batch = 2
        context = self.api.LlamaContext(self.model, params)
        batch = self.api.LlamaBatch(n_tokens=TOKENS * len(prompts), embd=0, n_seq_max=len(prompts))
        for row, prompt in enumerate(prompts):
            for place, token in enumerate(prompt):
                batch.add(token, place, [row], place == len(prompt) - 1)
        ends = [(row + 1) * TOKENS - 1 for row in range(len(prompts))]
        rows: list[list[int]] = [[] for _ in prompts]
        for place in range(TOKENS, TOKENS + n):
            context.decode(batch)
            batch.clear()
            for number, (row, end) in enumerate(zip(rows, ends, strict=True)):
                row.append(self.sampler.sample(context, end))
                batch.add(row[-1], place, [number], True)
            ends = list(range(len(prompts)))
        return rows


KINDS = {"qkv": Qkv, "huggingface": HuggingFace, "llama.cpp": LlamaCpp}


def work(name: str, path: Path) -> None:
    """Load, then answer each line of standard input, a number of rows, with what it took."""
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    kind, _, mode = name.partition(":")
    before = time.perf_counter()
    contestant = KINDS[kind](path, mode)
    loaded = time.perf_counter() - before
    generator = torch.Generator().manual_seed(0)
    for line in sys.stdin:
        prompts = torch.randint(10, 40_000, (int(line), TOKENS), generator=generator.manual_seed(0)).tolist()
        before = time.perf_counter()
        contestant.write(prompts, 1)
        first = time.perf_counter() - before
        before = time.perf_counter()
        rows = contestant.write(prompts, TOKENS)
        rest = time.perf_counter() - before - first
        assert all(len(row) == TOKENS for row in rows), "a row ended early"
        answer = {
            "load": loaded,
            "first": first,
            "prefill": int(line) * TOKENS / first,
            "decode": int(line) * (TOKENS - 1) / rest,
            "memory": peak_memory(),
            "weights": contestant.weight_bytes,
            "tokens": rows[0][:8],
        }
        print(f"answer: {json.dumps(answer)}", flush=True)


def peak_memory() -> int:
    """The most that this process had in memory, in bytes. `ru_maxrss` would be the parent's, where that was more."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def start(name: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", name, "--file", str(path)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
    )


def ask(worker: subprocess.Popen[str], rows: int) -> dict:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(f"{rows}\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if line.startswith("answer: "):
            return json.loads(line.removeprefix("answer: "))
    sys.exit("a contestant ended; run it alone with --worker NAME --file FILE to see why")


def bandwidth() -> float:
    """Bytes per second that both cores read from memory."""
    torch.set_num_threads(2)
    x = torch.ones(1 << 27)  # half a gigabyte
    times = []
    for _ in range(5):
        before = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - before)
    return x.nbytes / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--file", type=Path, help="a GGUF file; by default that of `qkv pull smollm2`")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.file)
        return
    from qkv.checkpoints.named import pull

    path = options.file or pull("smollm2")
    speed = bandwidth()
    print(f"memory bandwidth {speed / 1e9:.1f} GB/s\n")
    workers = {name: start(name, path) for name in options.contestants}
    for rows in options.batch:
        found: dict[str, list[dict]] = {name: [] for name in workers}
        for worker in workers.values():
            ask(worker, rows)  # the first time is not counted: caches, and whatever compiles
        for _ in range(options.rounds):
            for name, worker in workers.items():
                found[name].append(ask(worker, rows))
        print(f"**batch {rows}, {TOKENS} + {TOKENS} tokens, medians of {options.rounds}**\n")
        print("| contestant | load s | prefill tokens/s | decode tokens/s | of the limit | peak memory MB |")
        print("|---|---:|---:|---:|---:|---:|")
        for name, answers in found.items():
            median = {
                key: statistics.median(a[key] for a in answers) for key in ("load", "prefill", "decode", "memory")
            }
            limit = speed / answers[0]["weights"]
            share = f"{median['decode'] / limit:.0%} of {limit:.0f}" if rows == 1 else ""
            print(
                f"| {name} | {median['load']:.1f} | {median['prefill']:.0f} | {median['decode']:.1f} | {share} "
                f"| {median['memory'] / 1e6:.0f} |"
            )
        print(flush=True)


if __name__ == "__main__":
    main()
