"""Text from ids that come one at a time."""

from collections.abc import Callable, Container, Sequence
from typing import final


@final
class TextStream:
    """Text from ids that come one at a time, never half a character.

    The pieces it returns, joined, are what `decode` makes of all the ids.

    Args:
        decode: Text of ids.
        bytes_: The ids of single bytes that are decoded together (`<0xE4>`): a run of them is text, or no text, as a
            whole, so that it is certain only at its end. Also of what has no text and does not end a run.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], bytes_: Container[int] = ()) -> None:
        self._decode, self._bytes = decode, bytes_
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that is certain now; often empty while a character is incomplete."""
        self._ids.append(token)
        if token in self._bytes:
            return ""
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
