"""A model that is no single stack, shown: what it is, its tokenizers, and its weights part by part."""

import math
import re
from collections import Counter
from pathlib import Path

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from qkv.cli.drawing import Terminal, size_in_bytes
from qkv.data import Tokenizer
from qkv.data.pairs import SIDES
from qkv.models.model import ModelConfig
from qkv.nn.embedders.token import OPEN_SIZE


def show_parts(name: str, config: ModelConfig, folder: Path, dtype: torch.dtype) -> None:
    """Print what the model is, which tokenizers stand in the folder, and a table of its weights."""
    with torch.device("meta"):
        model = config.closed().build()
    n = sum(p.numel() for p in model.parameters())
    console = Terminal()
    console.print(
        f"[bold]{escape(name)}[/bold] · {n:,} parameters · {size_in_bytes(n * dtype.itemsize)}\n{config.sentence}"
    )
    for side, size in zip(SIDES, config.vocabularies, strict=False):
        file = folder / side / "tokenizer.json"
        has = f"{Tokenizer.load(file).vocab_size:,} tokens, {file}" if file.is_file() else f"{size or 0:,} tokens"
        console.print(f"{side}: {has if size else f'set by the data; counted as {OPEN_SIZE} tokens'}", markup=False)
    if config.limit is not None:
        console.print(f"a text has at most {config.limit:,} tokens")
    console.print(_table(model, n))


def _table(model: torch.nn.Module, n: int) -> Table:
    """The weights with their shapes; those of blocks that are alike in one line."""
    made = Table(box=box.SIMPLE_HEAD, header_style="bold", show_footer=True, footer_style="bold", pad_edge=False)
    made.add_column("part", "total", overflow="fold")
    made.add_column("shape", overflow="fold")
    made.add_column("parameters", f"{n:,}", justify="right", no_wrap=True)  # a number is whole, or it is another one
    made.add_column("share", justify="right", no_wrap=True)
    for part, child in model.named_children():
        size = sum(p.numel() for p in child.parameters())
        if not size:
            continue
        made.add_row(part, "", f"{size:,}", f"{100 * size / n:.1f} %")
        names = ((name.replace("sublayers.", ""), tuple(p.shape)) for name, p in child.named_parameters())
        alike = Counter((re.sub(r"\b\d+\b", "*", name), shape) for name, shape in names)
        for (name, shape), copies in alike.items():
            label = f"  {copies} × {name}" if copies > 1 else f"  {name}"
            numbers = copies * math.prod(shape)
            share = f"{100 * numbers / n:.1f} %"
            made.add_row(label, " × ".join(map(str, shape)), f"{numbers:,}", share, style="dim")
    return made
