"""Plants faults in the library, one at a time, and sees that the tests find each: `make mutants`.

A mutant that survives is a hole in the suite. Each names the tests that ought to kill it; they run on a copy of the
tree, so that nothing here is changed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAWS, ATTEND, PARITY = "tests/laws/test_model_laws.py", "tests/laws/test_attend_laws.py", "tests/parity"
PARTS, ROTARY, LOSS = "tests/unit/nn/test_parts.py", "tests/unit/ops/test_rotary.py", "tests/unit/ops/test_loss.py"
RESUME = "tests/reliability/test_resume.py"


@dataclass(frozen=True)
class Mutant:
    """A fault: `old` becomes `new` in `src/qkv/<file>`, and `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    # Attention
    Mutant("scores are not scaled", "ops/attend.py", "1 / math.sqrt(q.shape[-1])", "1.0", ATTEND),
    Mutant("scale is 1/K", "nn/attention.py", "1 / math.sqrt(self.head_dim)", "1 / self.head_dim", PARITY),
    Mutant("kv heads in turn", "ops/reference.py",
           "k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)", "k = k.repeat(1, q.shape[1] // k.shape[1], 1, 1)", ATTEND),
    Mutant("a row that sees nothing sees all", "ops/reference.py", ".softmax(-1) * allowed", ".softmax(-1)", ATTEND),
    Mutant("-inf instead of the lowest number", "ops/reference.py", "torch.finfo(scores.dtype).min", "float('-inf')", ATTEND),
    Mutant("padding reaches the kernel", "ops/attend.py",
           "    if padding is not None:  # SDPA", "    if padding is None:  # SDPA", ATTEND),
    Mutant("documents are not causal", "ops/documents.py",
           "_cut(v, row, place), 0.0, causal, scale=scale)", "_cut(v, row, place), 0.0, False, scale=scale)", ATTEND),
    Mutant("documents run on into the next row", "ops/documents.py",
           "start = last + 1 if last + 1 < ids.shape[1] else 0", "start = last + 1", ATTEND),
    Mutant("dropout lives in evaluation", "nn/attention.py",
           "self.weight_dropout if self.training else 0.0", "self.weight_dropout", LAWS),
    Mutant("no norm of keys", "nn/attention.py", "q, k = self.q_norm(q), self.k_norm(k)", "q = self.q_norm(q)", PARTS),
    # Masks
    Mutant("a token does not see itself", "masks.py", "return k.order <= q.order", "return k.order < q.order", ATTEND),
    Mutant("a window one token wider", "masks.py", "(q.index - k.index).abs() < self.size", "(q.index - k.index).abs() <= self.size", ATTEND),
    Mutant("documents see each other", "masks.py", "return allowed & (a == b) & (b > 0)", "return allowed & (b > 0)", LAWS),
    Mutant("and is or", "masks.py", "self.a.allow(q, k) & self.b.allow(q, k)", "self.a.allow(q, k) | self.b.allow(q, k)", ATTEND),
    Mutant("packed is taken for full", "masks.py",
           "None if q.layout is Layout.FULL else q.segment", "None", LAWS),
    # Positions
    Mutant("exponent of the next pair", "nn/positions.py",
           "torch.arange(0, width, 2, dtype=torch.float64, device=device) / width",
           "torch.arange(2, width + 2, 2, dtype=torch.float64, device=device) / width", PARITY),
    Mutant("rotation backwards", "ops/rotary.py",
           "return torch.cat([a * cos - b * sin, b * cos + a * sin]", "return torch.cat([a * cos + b * sin, b * cos - a * sin]", ROTARY),
    Mutant("angles in float32", "ops/rotary.py",
           "position[..., None].to(frequencies.dtype) * frequencies", "position[..., None].float() * frequencies.float()", ROTARY),
    Mutant("learned positions of the slot, not the document", "nn/embedders/embedder.py",
           "self.position(tokens.index, x.dtype)", "self.position(torch.arange(x.shape[1])[None], x.dtype)", LAWS),
    Mutant("YaRN without its temperature", "nn/positions.py", "0.1 * math.log(self.factor) + 1 if", "1.0 if", PARITY),
    # Norms, FFN, blocks
    Mutant("ε outside the root", "nn/norms.py",
           "(wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()", "1 / (wide.square().mean(-1, keepdim=True).sqrt() + self.eps)", PARTS),
    Mutant("up is the gate", "nn/ffn.py", "gate, up = self.gate_up_proj(x)", "up, gate = self.gate_up_proj(x)", PARITY),
    Mutant("pre-norm without the norm", "nn/blocks.py", "update, report = f(norm(x), ctx)\n            x, aux = x + update", "update, report = f(x, ctx)\n            x, aux = x + update", PARTS),
    # Loss
    Mutant("ignored targets count", "ops/loss.py", "(log_p.gather(1, target)[:, 0] * counted)", "(log_p.gather(1, target)[:, 0])", LOSS),
    Mutant("the scale is lost in the gradient", "ops/loss.py", "counted.to(wide) * scale", "counted.to(wide)", LOSS),
    Mutant("what comes down is ignored", "ops/loss.py", "or grad.item() != 1.0", "and grad.item() != 1.0", LOSS),
    Mutant("softmax in bfloat16", "ops/loss.py", "dim=-1, dtype=wide)", "dim=-1).to(wide)", LOSS),
    # Caches
    Mutant("decoding forgets the last token", "caches.py", "self.bound += self._new.shape[1]", "self.bound += self._new.shape[1] - 1", LAWS),
    Mutant("padding is kept in the cache", "caches.py",
           "torch.where(new.valid, self.length[:, None] + rank, self.capacity)", "self.length[:, None] + torch.arange(n)", LAWS),
    Mutant("ragged rows start at the longest", "models/transformer.py",
           "0 if cache is None else cache.bound if cache.even else cache.length", "0 if cache is None else cache.bound", LAWS),
    # Models
    Mutant("a shared block has one slot", "models/transformer.py", "slot + self._slots[i]", "slot", LAWS),
    Mutant("biases survive initialisation", "models/init.py", "nn.init.zeros_(part.bias)", "pass", PARTS),
]  # fmt: skip


def run(tests: str, work: Path) -> bool:
    """Whether the tests pass on the copy."""
    environment = os.environ | {"PYTHONPATH": f"{work / 'src'}:{work / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # not a verdict of the tests
        sys.exit(f"{tests}: could not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def survives(mutant: Mutant, work: Path) -> bool:
    """Whether the tests pass although the fault is there."""
    path = work / "src" / "qkv" / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) < 1:
        sys.exit(f"{mutant.name}: {mutant.file} has no {mutant.old!r} any more; mend tests/mutants.py")
    header = "import torch\n" if "torch.arange(x.shape" in mutant.new else ""
    changed = text.replace(mutant.old, mutant.new, 1)
    if header:
        changed = changed.replace("import torch.nn.functional as F", "import torch\nimport torch.nn.functional as F", 1)
    path.write_text(changed, encoding="utf-8")
    try:
        return run(mutant.tests, work)
    finally:
        path.write_text(text, encoding="utf-8")


def main() -> None:
    """Try every mutant, or those whose name contains the words given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutants whose name contains one of these")
    words = parser.parse_args().words
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    left = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", work)
        for tests in sorted({mutant.tests for mutant in chosen}):
            if not run(tests, work):
                sys.exit(f"{tests} fails without any fault; mend that first")
        for mutant in chosen:
            alive = survives(mutant, work)
            left += [mutant.name] if alive else []
            sys.stdout.write(f"{'SURVIVED' if alive else 'killed  '}  {mutant.name}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - len(left)} of {len(chosen)} killed\n")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
