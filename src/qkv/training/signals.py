"""Signals: the first asks for an orderly end, the second ends at once."""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import final

_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
_SHOW_CURSOR = b"\x1b[?25h"  # the live display hides it


@final
class Interrupts:
    """While it is entered, SIGTERM, SIGINT and SIGHUP are noted instead of killing the process.

    A SIGHUP that is ignored stays ignored: so `nohup` asked.

    Args:
        note: Shows that the first was heard. It is called between any two instructions, so that it must not print.

    Attributes:
        received: The first signal, or None.
    """

    def __init__(self, note: Callable[[str], object]) -> None:
        self._note = note
        self.received: int | None = None
        self._before: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it; 0 if there was none."""
        return 0 if self.received is None else 128 + self.received

    def _hear(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            if os.isatty(1):
                os.write(1, _SHOW_CURSOR)
            os._exit(128 + number)  # the last good checkpoint is on the disk
        self.received = number
        self._note("stopping after this step; a second signal leaves at once")

    def __enter__(self) -> "Interrupts":
        watched = [signal.SIGTERM, signal.SIGINT]
        if _HANGUP is not None and signal.getsignal(_HANGUP) is not signal.SIG_IGN:
            watched.append(_HANGUP)
        self._before = {number: signal.signal(number, self._hear) for number in watched}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
