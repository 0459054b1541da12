"""What a person sees while a model learns."""

import io
import math
import time

import pytest
from rich.console import Console

from qkv.training import display
from qkv.training.display import Display, Progress, clock, sparkline


def progress(step=10, steps=40, history=(3.0, 2.0, 1.0), **changes):
    values = {"loss": 1.0, "validation": None, "tokens_per_second": 12345.6, "share_of_peak": 0.256}
    return Progress(
        step, steps, history=[float(x) for x in history], started=(time.monotonic() - 20, 0), **values | changes
    )


@pytest.mark.parametrize(
    ("values", "width", "bars"),
    [
        ([], 8, ""),
        ([1.0], 8, "▁"),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 8, "▁▂▃▄▅▆▇█"),
        ([4.0, 4.0, 0.0, 0.0], 2, "█▁"),
        ([1.0, 1.0, 1.0], 8, "▁▁▁"),
        ([0.0, math.nan, 1.0], 8, "▁!█"),
        ([0.0, math.inf, 1.0, 1.0], 2, "!▁"),
        ([math.nan, 0.0, 1.0], 8, "!▁█"),
        ([math.nan], 8, "!"),
    ],
)
def test_sparkline(values, width, bars):
    assert sparkline(values, width) == bars


def test_clock():
    assert [clock(seconds) for seconds in (0.4, 59.6, 3599.0, 3723.0)] == ["0:00", "1:00", "59:59", "1:02:03"]


def test_plain_lines_come_every_few_seconds_and_at_the_end(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    shown = Display("run")
    for step in range(1, 41):
        now[0] += 1.0
        shown.update(progress(step, validation=2.5 if step > 20 else None))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/40" for step in (1, 6, 11, 16, 21, 26, 31, 36, 40)]
    assert lines[1].startswith("step 6/40  loss 1.0000  12,346 tokens/s  26% of peak  ")
    assert lines[-1].startswith("step 40/40  loss 1.0000  held out 2.5000  12,346 tokens/s")
    assert lines[-1].endswith("0:00 left")


def test_the_time_that_is_left_follows_from_this_process_alone():
    """20 seconds for 10 steps after a resume at 100."""
    shown = progress(110, 200)
    shown.started = (shown.started[0], 100)
    assert shown.seconds_left == pytest.approx(180, rel=0.01)


def test_a_terminal_gets_a_panel_and_a_pipe_or_a_narrow_one_gets_lines(monkeypatch):
    assert Display("run")._live is None
    monkeypatch.setattr(Console, "is_terminal", True)
    monkeypatch.setattr(Console, "is_dumb_terminal", False)
    monkeypatch.setattr(Console, "width", 71)
    assert Display("run")._live is None
    monkeypatch.setattr(Console, "width", 72)
    live = Display("run")
    live.close()
    assert live._live is not None


def test_the_panel_is_redrawn_below_lines_that_stay():
    text = io.StringIO()
    live = Display("runs/tiny-1", Console(file=text, force_terminal=True, width=72, color_system=None))
    live.update(progress(history=range(500)))
    live.say("a path that must stay on one line: " + "x" * 100 + " :smile: [bold]")
    live.close()
    assert "a path that must stay on one line: " + "x" * 100 + " :smile: [bold]\n" in text.getvalue()
    names, values, bar, spark = (line for line in text.getvalue().splitlines() if "│" in line)
    assert names.split() == ["│", "step", "loss", "held", "out", "tokens/s", "of", "matmul", "peak", "left", "│"]
    assert values.split() == ["│", "10", "/", "40", "1.0000", "-", "12,346", "26%", "1:00", "│"]
    assert bar.count("━") == 17
    assert spark == f"│ {sparkline([float(i) for i in range(500)], 68)} │"
