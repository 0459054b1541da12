"""Sentences of unequal length through an encoder: qkv, which packs them, beside libraries that pad.

    python benchmarks/sentences.py              # MiniLM on sentences of Shakespeare
    python benchmarks/sentences.py --dtype bfloat16

All read the same ids. transformers and sentence-transformers (where it is installed) sort by length and pad batches of
32, as the latter does by default. It alone also makes the ids in the time that is counted.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import qkv
from qkv.checkpoints.named import pull
from qkv.data import SHAKESPEARE
from qkv.shapes import Tensor

BATCH = 32


def sentences(n: int) -> list[str]:
    """The first `n` of the plays."""
    found: list[str] = []
    for text in SHAKESPEARE.documents():
        found += [" ".join(one.split()) for one in re.findall(r"[^.!?]{20,700}[.!?]", text)]
        if len(found) >= n:
            break
    return found[:n]


def padded(model: torch.nn.Module, rows: list[list[int]]) -> Tensor:
    """The mean vector of each, by batches that are padded."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    made: list[Tensor] = [torch.empty(0)] * len(rows)
    for at in range(0, len(order), BATCH):
        places = order[at : at + BATCH]
        width = max(len(rows[i]) for i in places)
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in places])
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in places])
        with torch.inference_mode():
            stream = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        means = (stream * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        for place, vector in zip(places, F.normalize(means, dim=-1), strict=True):
            made[place] = vector
    return torch.stack(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="sentences")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(2)
    dtype, texts, folder = getattr(torch, options.dtype), sentences(options.n), pull("minilm")
    import transformers

    ours = qkv.load(folder, dtype=dtype)
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=dtype).eval()
    rows = [[*row.values][: ours.config.limit] for row in ours.read(texts)]
    contestants: dict[str, Callable[[], Tensor]] = {
        "qkv": lambda: ours.embed(rows),
        "transformers": lambda: padded(theirs, rows),
    }
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        print("sentence-transformers is not installed and left out\n")
    else:
        peer = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})
        contestants["sentence-transformers"] = lambda: peer.encode(texts, convert_to_tensor=True, batch_size=BATCH)
    vectors = {name: work() for name, work in contestants.items()}  # and warm
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, work in contestants.items():
            before = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - before)
    lengths = [len(row) for row in rows]
    said = f"{len(rows)} sentences of {min(lengths)} to {max(lengths)} tokens"
    print(f"{said}, {options.dtype}, medians of {options.rounds}\n")
    print("| contestant | sentences/s | spread | ratio of qkv | lowest cosine with qkv |\n|---|---:|---:|---:|---:|")
    mine = statistics.median(seconds["qkv"])
    for name, times in seconds.items():
        middle, spread = statistics.median(times), (max(times) - min(times)) / statistics.median(times)
        cosine = (vectors[name].float() * vectors["qkv"].float()).sum(-1).min().item()
        print(f"| {name} | {len(rows) / middle:.0f} | {spread:.0%} | {middle / mine:.2f} | {cosine:.6f} |")


if __name__ == "__main__":
    main()
