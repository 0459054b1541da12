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
        # The longest end of the held text with which a stop string begins may become one.
        longest = max((len(stop) for stop in self._stops), default=1)
        ends = (self._held[at:] for at in range(max(0, len(self._held) - longest + 1), len(self._held)))
        maybe = next((end for end in ends if any(stop.startswith(end) for stop in self._stops)), "")
        text, self._held = self._held.removesuffix(maybe), maybe
        return text

    def flush(self) -> str:
        """The rest, at the end."""
        return "" if self.stopped else self._held
