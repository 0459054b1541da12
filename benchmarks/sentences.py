"""Sentences of unequal length through an encoder: qkv, which packs them, beside libraries that pad.

    python benchmarks/sentences.py              # MiniLM on sentences of Shakespeare
    python benchmarks/sentences.py --dtype bfloat16
    python benchmarks/sentences.py --dtype int8   # weights and activations: qkv's w8a8, onnxruntime's dynamic

All read the same ids. All but qkv sort by length and pad batches of 32, as sentence-transformers does by default; it
alone also makes the ids in the time that is counted. What is not installed is left out (onnxruntime and onnxscript are
in the extra `judge`, sentence-transformers in `bench`). The rank correlation is that of the cosines of all pairs with
those of qkv in float32.
"""

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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


def padded(stream_of: Callable[[Tensor, Tensor], Tensor], rows: list[list[int]]) -> Tensor:
    """The mean vector of each, by batches that are padded: `stream_of` is given ids and the mask."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    made: list[Tensor] = [torch.empty(0)] * len(rows)
    for at in range(0, len(order), BATCH):
        places = order[at : at + BATCH]
        width = max(len(rows[i]) for i in places)
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in places])
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in places])
        with torch.inference_mode():
            stream = stream_of(ids, mask).float()
        means = (stream * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        for place, vector in zip(places, F.normalize(means, dim=-1), strict=True):
            made[place] = vector
    return torch.stack(made)


def onnx_stream(model: Any, *, int8: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The stream by onnxruntime, on two threads; `ImportError` where it or the exporter is not installed."""
    import onnxruntime
    import onnxscript  # noqa: F401  # which the exporter of PyTorch needs

    class Stream(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    folder = Path(tempfile.mkdtemp())
    ids = torch.full((2, 8), 7)
    mask = torch.tensor([[1] * 8, [1] * 4 + [0] * 4])  # of one that hides nothing no trace would be left
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.config.max_position_embeddings)}
    exported = torch.export.export(Stream().eval(), (ids, mask), dynamic_shapes=(sizes, sizes))
    program = torch.onnx.export(exported, (), input_names=["ids", "mask"], dynamo=True, verbose=False)
    assert program is not None
    program.save(str(folder / "model.onnx"))
    if int8:
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(folder / "model.onnx", folder / "int8.onnx", per_channel=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / ("int8.onnx" if int8 else "model.onnx"), options)
    return lambda ids, mask: torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])


def rank_correlation(vectors: Tensor, others: Tensor) -> float:
    """Spearman's, of the cosines of all pairs."""
    pairs = np.triu_indices(len(vectors), 1)
    ranks = [np.argsort(np.argsort((x.float() @ x.float().T).numpy()[pairs])) for x in (vectors, others)]
    return float(np.corrcoef(*ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="sentences")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "int8"], default="float32")
    options = parser.parse_args()
    torch.set_num_threads(2)
    texts, folder, int8 = sentences(options.n), pull("minilm"), options.dtype == "int8"
    dtype = torch.float32 if int8 else getattr(torch, options.dtype)
    import transformers

    exact = qkv.load(folder)
    ours = qkv.load(folder, quantize="w8a8") if int8 else qkv.load(folder, dtype=dtype)
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=dtype).eval()
    rows = [[*row.values][: ours.config.limit] for row in ours.read(texts)]
    contestants: dict[str, Callable[[], Tensor]] = {"qkv": lambda: ours.embed(rows)}
    if not int8:
        plain = lambda ids, mask: theirs(input_ids=ids, attention_mask=mask).last_hidden_state  # noqa: E731
        contestants["transformers"] = lambda: padded(plain, rows)
        try:
            from sentence_transformers import SentenceTransformer

            peer = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})
            contestants["sentence-transformers"] = lambda: peer.encode(texts, convert_to_tensor=True, batch_size=BATCH)
        except ImportError:
            print("sentence-transformers is not installed and left out\n")
    if dtype is torch.float32:
        try:
            by_onnx = onnx_stream(theirs, int8=int8)
            contestants["onnxruntime"] = lambda: padded(by_onnx, rows)
        except ImportError:
            print("onnxruntime or onnxscript is not installed and left out\n")
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
    print("| contestant | sentences/s | spread | ratio of qkv | rank correlation |\n|---|---:|---:|---:|---:|")
    reference = exact.embed(rows)
    assert isinstance(reference, Tensor)
    mine = statistics.median(seconds["qkv"])
    for name, times in seconds.items():
        middle, spread = statistics.median(times), (max(times) - min(times)) / statistics.median(times)
        rank = rank_correlation(vectors[name], reference)
        print(f"| {name} | {len(rows) / middle:.0f} | {spread:.0%} | {middle / mine:.2f} | {rank:.5f} |")


if __name__ == "__main__":
    main()
