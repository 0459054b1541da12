"""A model drawn for the terminal, and the table of what its parts cost."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from qkv.config import Config
from qkv.cost import Cost, PartCost
from qkv.models.stack import Repeat, runs
from qkv.models.transformer import TransformerConfig
from qkv.nn.blocks import BlockConfig
from qkv.nn.sublayer import SublayerConfig


class Terminal(Console):
    """Standard output as it is, with a pipe that nobody reads left to `qkv.cli.main`."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        """Raise the error again, which rich has caught; it would end the program itself."""
        raise


_WIDTH = 78
_STREAM_AT = 5  # column of the stream
_NOTES_AT = 42  # column of what is said about a sublayer

_WIRE, _FRAME, _NAME, _FORMULA, _QUIET = "cyan", "dim", "bold", "italic magenta", "dim"


def draw(name: str, config: TransformerConfig, cost: Cost) -> Group:
    """The stack, from the input down to the output, 78 columns wide; a repeated block is drawn once."""
    parts = iter(cost.parts)
    context = f" · made for {config.limit:,} tokens" if config.limit else ""
    lines = [Text.assemble(" ", (name, _NAME), f" · {cost.parameters:,} parameters{context}\n")]
    embed, head = config.embed, config.head
    position = [f"+ {embed.position.describe()}"] if embed.position else []
    rows = [Text(f" {note}") for note in embed.notes(config.d_model) + position]
    lines += [_wire(embed.takes), *_box("embed", next(parts), rows), _wire(f"x  (T, {config.d_model:,})")]
    for run in runs(config.blocks):
        lines += _run(run, parts, config.d_model)
    if config.final_norm is not None:
        lines += [*_box(f"final norm: {config.final_norm.tag()}", next(parts), []), _wire()]
    if head is not None:
        rows = [Text(f" {note}") for note in head.notes(config.d_model, embed)]
        lines += [*_box(f"head: {head.tag()}", next(parts), rows), _wire(head.gives)]
    return Group(*lines)


def _run(run: Repeat, parts: Iterator[PartCost], d_model: int) -> Iterator[Text]:
    several = len(run.blocks) > 1
    if several:
        yield _wire(f"{run.n} × the next {len(run.blocks)} in turn")
    for block in run.blocks:
        part = next(parts)
        title = block.tag() if several or run.n == 1 else f"{run.n} × {block.tag()}"
        title += ", one set of weights" if run.shared else ""
        yield from _box(title, part, _block(block, part, d_model))
        yield _wire()


# --- boxes and wires ------------------------------------------------------------------------------------------------


def _wire(note: str = "") -> Text:
    """The stream between two boxes."""
    return Text.assemble(" " * _STREAM_AT, ("│", _WIRE), (f"  {note}" if note else "", _QUIET))


def _box(title: str, part: PartCost, rows: Iterable[Text]) -> Iterator[Text]:
    size = part.open or (f"{part.parameters:,} parameters" if part.parameters else "")
    left, right = "─" * (_STREAM_AT - 1), f" {size} ─" if size else ""
    fill = "─" * (_WIDTH - _STREAM_AT - len(title) - len(right) - 6)
    yield Text.assemble(
        (f"╭{left}", _FRAME), ("┴", _WIRE), ("─ ", _FRAME), (title, _NAME), (f" {fill}─{right}╮", _FRAME)
    )
    for row in rows:
        row.truncate(_WIDTH - 2, overflow="ellipsis", pad=True)
        yield Text.assemble(("│", _FRAME), row, ("│", _FRAME))
    yield Text.assemble((f"╰{left}", _FRAME), ("┬", _WIRE), ("─" * (_WIDTH - _STREAM_AT - 2) + "╯", _FRAME))


def _row(picture: str, note: str = "") -> Text:
    """A line inside a box: wires, with the names of parts on them, and a note beside them."""
    drawn = Text(picture, _WIRE)
    drawn.highlight_regex(r"\w+", _NAME)
    return Text.assemble(" " * (_STREAM_AT - 1), drawn, " " * max(2, _NOTES_AT - _STREAM_AT - len(picture)), note)


# --- what is in the boxes -------------------------------------------------------------------------------------------


def _block(config: BlockConfig, part: PartCost, d_model: int) -> Iterator[Text]:
    scale = "" if config.layer_scale is None else f", updates scaled from {config.layer_scale:g}"
    said = Text.assemble((config.formula or config.tag(), _FORMULA), (f"    norm: {config.norm.tag()}{scale}", _QUIET))
    yield Text.assemble(" " * (_STREAM_AT - 1), ("│  ", _WIRE), said)
    sublayers = [(each.name, _notes(each.config, d_model)) for each in part.parts[1:]]
    if "Σ" in config.formula:
        yield from _parallel(sublayers, shared="norm_f" not in config.formula)
        return
    on_stream, before, after = _norms(config.formula)
    for name, notes in sublayers:
        way = "├─▸ " + " ─▸ ".join(["norm"] * before + [name] + ["norm"] * after) + " ─╮"
        pictures = [way, "⊕◂" + "─" * (len(way) - 3) + "╯"] + ["norm"] * on_stream
        yield _row("│")
        for picture, note in zip_longest(pictures, notes):
            yield _row(picture or "│", note or "")


def _norms(formula: str) -> tuple[int, int, int]:
    """How many norms stand on the stream behind a sublayer, and on the way through it before f and after."""
    stream, _, update = formula.rpartition("+")
    outer, f, inner = update.partition("f(")
    return stream.count("norm"), inner.count("norm"), outer.count("norm") if f else 0


def _notes(config: Config, d_model: int) -> list[str]:
    assert isinstance(config, SublayerConfig)
    return config.notes(d_model)


def _parallel(sublayers: list[tuple[str, list[str]]], *, shared: bool) -> Iterator[Text]:
    width = max(len(name) for name, _ in sublayers)
    yield _row("│")
    for i, (name, notes) in enumerate(sublayers):
        first, last = i == 0, i == len(sublayers) - 1
        if shared:
            start = "├─▸ norm ─┬─▸ " if first else "│         ├─▸ " if not last else "│         ╰─▸ "
        else:
            start = "├─┬─▸ norm ─▸ " if first else "│ ├─▸ norm ─▸ " if not last else "│ ╰─▸ norm ─▸ "
        yield _row(f"{start}{name} {'─' * (width - len(name))}─{'╮' if first else '┤'}", notes[0])
        inner = " " if last else "│"
        inner = f"│         {inner}   " if shared else f"│ {inner}           "
        for note in notes[1:]:
            yield _row(f"{inner}{' ' * width}  │", note)
    yield _row(f"⊕◂{'─' * (width + 14)}╯")


# --- the table ------------------------------------------------------------------------------------------------------


def table(cost: Cost) -> Group:
    """Parameters, bytes and FLOPs of each part, and what the sums mean."""
    dtype = str(cost.dtype).removeprefix("torch.")
    made = Table(box=box.SIMPLE_HEAD, header_style="bold", show_footer=True, footer_style="bold", pad_edge=False)
    made.add_column("part", "total")
    made.add_column("parameters", f"{cost.parameters:,}", justify="right")
    made.add_column("share", justify="right")
    made.add_column(dtype, size_in_bytes(cost.weight_bytes), justify="right")
    made.add_column("FLOPs/token", _si(cost.flops_per_token), justify="right")
    made.add_column("cache/token", size_in_bytes(cost.cache_bytes_per_token), justify="right")
    for part in cost.parts:
        times = f"{part.copies} × " if part.copies != 1 else ""
        _add(made, cost, part, times + part.config.tag() if part.parts else part.name, "")
        for inner in part.parts:
            _add(made, cost, inner, f"  {inner.name}", _QUIET)
    context, cache = f"{cost.context:,}", size_in_bytes(cost.cache_bytes_per_token * cost.context)
    lines = [
        f"FLOPs: matrix products of the forward pass, mean over a text of {context} tokens.",
        f"Training takes three times as many: {_si(cost.training_flops_per_token)} per token.",
        f"The cache of one text of {context} tokens: {cache} in {dtype}.",
    ]
    if cost.active_parameters != cost.parameters:
        lines.append(f"Of the parameters {cost.active_parameters:,} act on a token.")
    if cost.state_bytes:
        lines.append(f"Besides, a cache keeps {size_in_bytes(cost.state_bytes)} of each text, however long it is.")
    if left_open := {part.open for part in cost.parts if part.open}:
        lines.append(f"… is not counted: it is {' or '.join(sorted(left_open))}.")
    return Group(made, *(Text(line, _QUIET) for line in lines))


def _add(made: Table, cost: Cost, part: PartCost, name: str, style: str) -> None:
    if part.open and not part.parameters:
        made.add_row(name, "…", style=style)
        return
    share = f"{100 * part.parameters / cost.parameters:.1f} %" if cost.parameters else ""
    size, cache = part.parameters * cost.dtype.itemsize, part.cached * cost.dtype.itemsize
    flops, cached = _si(part.flops) if part.flops else "", size_in_bytes(cache) if cache else ""
    made.add_row(name, f"{part.parameters:,}", share, size_in_bytes(size), flops, cached, style=style)


def _si(n: float) -> str:
    """Three digits and a letter: 12_345_678 is 12.3 M."""
    return _scaled(n, 1000, ("", " k", " M", " G", " T", " P", " E"))


def size_in_bytes(n: float) -> str:
    """Three digits and a unit: 12_345_678 is 11.8 MiB."""
    return _scaled(n, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB"))


def _scaled(n: float, step: int, units: Sequence[str]) -> str:
    power = 0
    while n >= step and power < len(units) - 1:
        n, power = n / step, power + 1
    return (f"{n:.3g}" if n < 100 else f"{n:.0f}") + units[power]


def certificate_lines(made: dict[str, Any]) -> list[str]:
    """A certificate in words."""
    lines = [f"source {made.get('source')}, SHA-256 {str(made.get('sha256'))[:16]}…"]
    if made.get("reference") is None:
        return [*lines, f"not compared: {made.get('reason')}"]
    layers, logits = made["largest_difference"]["layers"], made["largest_difference"]["logits"]
    worst = max(range(len(layers)), key=layers.__getitem__)
    return [
        *lines,
        f"against {made['reference']} on {made['inputs']['tokens']} fixed tokens, float32:",
        f"  logits differ by at most {logits:.1e} (the largest is {made['largest']['logits']:.1f})",
        f"  the stream by at most {layers[worst]:.1e}, after block {worst} (there the largest is "
        f"{made['largest']['layers'][worst]:.1f})",
    ]
