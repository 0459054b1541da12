"""Which kernel of attention runs where: the table of `qkv show --kernels`."""

from collections import Counter
from collections.abc import Iterator

import torch
from rich import box
from rich.table import Table

from qkv.cli.drawing import size_in_bytes
from qkv.lowered import LoweredMask, lower
from qkv.models.stack import runs
from qkv.models.transformer import TransformerConfig
from qkv.nn.blocks import sublayers_of
from qkv.nn.mixer import AttentionLayer
from qkv.ops.attend import BACKENDS, choose
from qkv.ops.backend import Problem
from qkv.tokens import Tokens


def kernels(config: TransformerConfig, *, tokens: int, batch: int, dtype: torch.dtype) -> Table:
    """A row for each kind of attention layer and of batch: what runs, its memory, and why nothing faster does.

    Args:
        config: The model.
        tokens: In a row.
        batch: Rows.
        dtype: Of queries, keys and values.
    """
    rows: Counter[tuple[str, ...]] = Counter()
    for layer, n in _layers(config):
        for what, problem in _problems(layer, tokens, batch, dtype).items():
            choice = choose(problem)
            why = "; ".join(f"{name} {reason}" for name, reason in choice.passed)
            memory = size_in_bytes(BACKENDS[choice.name].memory(problem))
            rows[layer.mask.describe(), what, choice.name, memory, why or "-"] += n
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for name in ("layers", "mask", "batch", "kernel", "memory", "passed over"):
        table.add_column(name)
    for row, n in rows.items():
        table.add_row(str(n), *row)
    return table


def _layers(config: TransformerConfig) -> Iterator[tuple[AttentionLayer, int]]:
    """The attention layers, each kind once for every place in the config, and how often it is applied."""
    for run in runs(config.blocks):
        for block in run.blocks:
            with torch.device("meta"):
                parts = sublayers_of(block.build(config.d_model))
            yield from ((part, run.n) for part in parts if isinstance(part, AttentionLayer))


def _problems(layer: AttentionLayer, tokens: int, batch: int, dtype: torch.dtype) -> dict[str, Problem]:
    """The layer's problem in training, on full and on packed rows, and in decoding."""
    heads = layer.heads

    def problem(mask: LoweredMask, queries: int = tokens) -> Problem:
        sizes = ((heads.n_heads, queries, heads.head_dim), (heads.n_kv_heads, tokens, heads.head_dim))
        values = (heads.n_kv_heads, tokens, heads.value_dim)
        q, k, v = (torch.empty((), dtype=dtype).expand(batch, *size) for size in (*sizes, values))  # no memory
        return layer.problem(q, k, v, mask, training=queries > 1)

    full = Tokens.full(batch, tokens)
    halves = Tokens.packed([[tokens - tokens // 2, tokens // 2] if tokens > 1 else [1]] * batch)
    last = Tokens.full(batch, 1, start=tokens - 1)
    return {
        f"{batch} x {tokens:,}": problem(lower(layer.mask, full, full)),
        "packed": problem(lower(layer.mask, halves, halves)),
        "decoding": problem(lower(layer.mask, last, full, past=True), 1),
    }
