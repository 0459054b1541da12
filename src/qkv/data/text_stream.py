"""Text from ids that come one at a time."""

from collections.abc import Callable, Sequence
from typing import final


@final
class TextStream:
    """Text from ids that come one at a time, never half a character.

    The pieces it returns, joined, are what `decode` makes of all the ids.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that is certain now; often empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        new = self._advance(text.rstrip("\ufffd"))
        if new and not text.endswith("\ufffd"):
            # One token stays: some tokenizers write a word at the beginning without its space.
            self._ids = [token]
            self._shown = len(self._decode(self._ids))
        return new

    def flush(self) -> str:
        """The rest, at the end."""
        return self._advance(self._decode(self._ids))

    def _advance(self, text: str) -> str:
        new = text[self._shown :]
        self._shown += len(new)
        return new
