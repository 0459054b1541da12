"""Text that ends before a stop string."""

from collections.abc import Sequence
from typing import final

from qkv.errors import ConfigError


@final
class StopFilter:
    """Hands text on until a stop string is complete, and nothing of the stop string, however the text is cut up.

    The stop string that is complete first counts; of two that end in the same place, the longer.

    Attributes:
        stopped: Whether a stop string was found.

    Raises:
        ConfigError: A stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ConfigError("a stop string is empty and would end every text at once; leave it out")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain now; what may be the beginning of a stop string is held back."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)[1]]
        certain = len(self._held) - self._beginning()
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def flush(self) -> str:
        """The rest, at the end."""
        return "" if self.stopped else self._held

    def _beginning(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-n:]) for stop in self._stops):
                return n
        return 0
