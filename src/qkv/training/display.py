"""What a person sees while a model learns: a live panel on a terminal, a plain line every few seconds elsewhere."""

import contextlib
import itertools
import math
import os
import threading
import time
from dataclasses import dataclass
from typing import final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_BARS = "▁▂▃▄▅▆▇█"
_SECONDS_BETWEEN_LINES = 5.0
_WIDTH, _FRAME = 68, 4  # columns inside the panel, and for its frame


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: Updates done.
        steps: Updates to do.
        loss: Of the last update.
        validation: Last loss on held-out data, None before the first.
        tokens_per_second: Tokens read, averaged over the last updates.
        share_of_peak: Useful operations per second, by those of a large matrix product on this machine.
        history: Losses so far.
        started: When this process began to train, and after how many updates.
    """

    step: int
    steps: int
    loss: float
    validation: float | None
    tokens_per_second: float
    share_of_peak: float
    history: list[float]
    started: tuple[float, int]

    @property
    def seconds_left(self) -> float:
        """At the mean speed so far, evaluations and checkpoints included."""
        since, first = self.started
        return (time.monotonic() - since) / max(1, self.step - first) * (self.steps - self.step)


@final
class Display:
    """A panel that is redrawn in place on a terminal that is wide enough; elsewhere a line every few seconds."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        console = console or Console()
        self._title, self._next, self._doing, self._note = title, 0.0, "", ""
        self.progress: Progress | None = None
        self._later = threading.Timer(0.0, lambda: None)
        wide = console.is_terminal and not console.is_dumb_terminal and console.width >= _WIDTH + _FRAME
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=4) if wide else None
        if self._live is not None:
            self._live.start()

    def _draw(self) -> RenderableType:
        doing = Text("\n".join(filter(None, (self._doing, self._note))))
        if self.progress is None:
            return doing or Text("…")
        return Panel(Group(_table(self.progress), *([doing] if doing else [])), title=self._title, expand=False)

    def update(self, progress: Progress) -> None:
        """Called after every update of the weights, which may take less than a millisecond."""
        self._later.cancel()
        self.progress, self._doing = progress, ""
        now = time.monotonic()
        if self._live is None and (now >= self._next or progress.step == progress.steps):
            self._next = now + _SECONDS_BETWEEN_LINES
            self.say(_line(progress))

    def doing(self, what: str, done: int = 0, of: int = 0) -> None:
        """Work that takes a while: in the panel, or as a line after a second (if counted, every few seconds)."""
        self._later.cancel()
        self._doing = f"{what} {done:,}/{of:,}" if of else what
        now = time.monotonic()
        if self._live is None and not of:
            self._later = threading.Timer(1.0, self._say_if_possible, [what])
            self._later.daemon = True
            self._later.start()
        elif self._live is None and now >= self._next:
            self._next = now + _SECONDS_BETWEEN_LINES
            self.say(self._doing)

    def _say_if_possible(self, message: str) -> None:
        with contextlib.suppress(OSError):
            self.say(message)

    def note(self, message: str) -> None:
        """A message from within a signal's handler, where locks may be held and a line be half written."""
        self._note = message
        if self._live is None:
            with contextlib.suppress(OSError):
                os.write(2, f"\nqkv: {message}\n".encode())

    def say(self, message: str) -> None:
        """A line that stays, as it is: no wrapped paths, no emoji made of a model's text."""
        if self._live is None:
            print(message, flush=True)  # noqa: T201 - this is the display
        else:
            self._live.console.print(message, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last picture where it is."""
        self._later.cancel()
        if self._live is not None:
            self._live.stop()


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _line(p: Progress) -> str:
    held_out = "" if p.validation is None else f"  held out {p.validation:.4f}"
    return (
        f"step {p.step}/{p.steps}  loss {p.loss:.4f}{held_out}  {p.tokens_per_second:,.0f} tokens/s  "
        f"{p.share_of_peak:.0%} of peak  {clock(p.seconds_left)} left"
    )


def _table(p: Progress) -> Table:
    table = Table.grid(padding=(0, 3))
    held_out = "-" if p.validation is None else f"{p.validation:.4f}"
    names = ("step", "loss", "held out", "tokens/s", "of matmul peak", "left")
    values = (
        f"{p.step:,} / {p.steps:,}", f"{p.loss:.4f}", held_out, f"{p.tokens_per_second:,.0f}", f"{p.share_of_peak:.0%}",
        clock(p.seconds_left),
    )  # fmt: skip
    table.add_row(*(Text(name, style="dim") for name in names))
    table.add_row(*(Text(value, style="bold") for value in values))
    lines = Table.grid()
    lines.add_row(table)
    lines.add_row(ProgressBar(total=p.steps, completed=p.step, width=_WIDTH))
    lines.add_row(Text(sparkline(p.history, _WIDTH), style="cyan"))
    return lines


def sparkline(values: list[float], width: int) -> str:
    """The values as a row of bars, averaged into at most `width` columns; the lowest is the lowest bar.

    A column with a value that is not finite is a `!`.
    """
    if not values:
        return ""
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = 8 / (high - low) if high > low else 0.0
    return "".join(_BARS[min(7, int((mean - low) * scale))] if math.isfinite(mean) else "!" for mean in means)
