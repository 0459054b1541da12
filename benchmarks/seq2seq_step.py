"""One training step of the recurrent translator against the step-by-step loop of the classic tutorials.

    python benchmarks/seq2seq_step.py --json seq2seq_step.json

GRU 256, one bidirectional layer, additive scores, both vocabularies 10,000, 64 pairs of 30 tokens; forward and
backward, contestants in turn, medians. The loop is written here from the equations of Bahdanau et al. 2015, section A,
as tutorials write it: at every step it projects the keys, scores them, makes logits and adds up the loss. Both have the
same weights, and the script stops where their losses differ by more than 1e-5 in float32.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.models.decoders import BahdanauConfig
from qkv.models.pairs import Pair
from qkv.models.seq2seq import Seq2Seq, Seq2SeqConfig
from qkv.nn.embedders import TokenEmbedderConfig
from qkv.tokens import Tokens
from qkv.training.memory import keep_pages


class Tutorial(nn.Module):
    """The same model, one step after another, with the weights of ours."""

    def __init__(self, ours: Seq2Seq) -> None:
        super().__init__()
        decoder, net = ours.decoder, ours.decoder.net.net
        self.source, self.target, self.encoder = ours.source.weight, ours.target.weight, ours.encoder.net.net
        self.bridge, self.readout, self.head = decoder.bridge[0], decoder.readout, ours.head.weight
        self.q_proj, self.k_proj, self.v = decoder.score.q_proj, decoder.score.k_proj, decoder.score.v
        self.cell = nn.GRUCell(net.input_size, net.hidden_size)
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(self.cell, part, getattr(net, f"{part}_l0"))

    def step(self, token: Tensor, s: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The logits after one token, and the next state."""
        scores = torch.tanh(self.q_proj(s)[:, None] + self.k_proj(h)) @ self.v
        context = torch.bmm(scores.softmax(-1)[:, None], h)[:, 0]
        y = F.embedding(token, self.target)
        s = self.cell(torch.cat([y, context], dim=-1), s)
        return F.linear(torch.tanh(self.readout(torch.cat([s, context, y], dim=-1))), self.head), s

    def loss(self, source: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy."""
        h, final = self.encoder(F.embedding(source, self.source))
        s = torch.tanh(self.bridge(torch.cat([final[-2], final[-1]], dim=-1)))
        total = h.new_zeros(())
        for t in range(inputs.shape[1]):
            logits, s = self.step(inputs[:, t], s, h)
            total = total + F.cross_entropy(logits.float(), targets[:, t])
        return total / inputs.shape[1]


def contestants(arguments: argparse.Namespace) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    torch.manual_seed(0)
    embed = TokenEmbedderConfig(vocab_size=arguments.vocab)
    ours = Seq2SeqConfig(d_model=arguments.width, source=embed, target=embed, decoder=BahdanauConfig()).build()
    loop = Tutorial(ours)
    shape = (arguments.batch, arguments.length)
    source, inputs, targets = (torch.randint(0, arguments.vocab, shape) for _ in range(3))
    pair = Pair(source, Tokens.full(*shape), inputs)
    weights = list(ours.parameters())
    found: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "tutorial loop": (lambda: loop.loss(source, inputs, targets), weights),
        "qkv": (lambda: ours.loss(pair, targets)[0], weights),
    }
    if arguments.compile:
        step = torch.compile(loop.step)
        compiled = torch.compile(lambda: ours.loss(pair, targets)[0])

        def compiled_loop() -> Tensor:
            loop.step = step
            try:
                return loop.loss(source, inputs, targets)
            finally:
                del loop.step

        found |= {"tutorial loop, compiled": (compiled_loop, weights), "qkv, compiled": (compiled, weights)}
    return found


def seconds_of(arguments: argparse.Namespace, dtype: str) -> dict[str, float]:
    runs = contestants(arguments)
    times: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, float] = {}
    for _ in range(arguments.rounds + 1):
        for name, (loss_of, weights) in runs.items():
            narrow = torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
            start = time.perf_counter()
            with narrow:
                loss = loss_of()
            loss.backward()
            times[name].append(time.perf_counter() - start)
            losses[name] = loss.item()
            for p in weights:
                p.grad = None
    spread = max(losses.values()) - min(losses.values())
    if dtype == "float32" and spread > 1e-5:
        raise SystemExit(f"the losses differ by {spread:.1e}: {losses}")
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 256), ("vocab", 10_000), ("batch", 64), ("length", 30), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_pages()
    results = {}
    for dtype in arguments.dtypes:
        seconds = results[dtype] = seconds_of(arguments, dtype)
        base = seconds["tutorial loop"]
        for name, value in seconds.items():
            print(f"{dtype:<9} {name:<24} {value * 1e3:8.1f} ms   {base / value:5.2f} x", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"arguments": vars(arguments) | {"json": None}, "seconds": results}))


if __name__ == "__main__":
    main()
