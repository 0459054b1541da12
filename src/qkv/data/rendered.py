"""Text that knows which of its characters came out of a message.

A chat template writes one string, in which its own words, special tokens among them, stand between those of people.
What a person wrote must never be read as a special token. Searching the text for the message would be guesswork, since
templates trim and cut. So the characters carry their source from the start, and every operation of a template keeps it.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final, SupportsIndex, final

TOOLS: Final = -1  # the source of what describes tools
SEVERAL: Final = -2  # the source of text in which those of several can no longer be told apart

Run = tuple[int, int, int]  # start, end, source


@final
class Rendered(str):
    """What a chat template writes: a string that knows its sources.

    Attributes:
        runs: (start, end, message) of each stretch that came out of a message; `message` is its place in the list,
            `TOOLS` or `SEVERAL`. All other characters are the template's own.
        generated: (start, end) of what stands between `{% generation %}` and `{% endgeneration %}`.
    """

    __slots__ = ("generated", "runs")
    runs: tuple[Run, ...]
    generated: tuple[tuple[int, int], ...]

    def __new__(cls, text: str, runs: Iterable[Run] = (), generated: Iterable[tuple[int, int]] = ()) -> "Rendered":
        """The string with its sources."""
        self = str.__new__(cls, text)
        self.runs, self.generated = tuple(runs), tuple(generated)
        return self

    def __str__(self) -> str:
        return self  # `str(text)` must not lose the sources

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if not isinstance(key, slice):
            at = range(len(self))[key]
            return self.cut(at, at + 1)
        start, stop, step = key.indices(len(self))
        return self.cut(start, max(start, stop)) if step == 1 else taint(str.__getitem__(self, key), self)

    def __iter__(self) -> Iterator[str]:
        return (self.cut(i, i + 1) for i in range(len(self)))

    def cut(self, start: int, stop: int) -> "Rendered":
        """The characters from `start` to before `stop`, with their sources."""
        if start >= stop:
            return Rendered("")
        runs = [(max(a, start) - start, min(b, stop) - start, s) for a, b, s in self.runs if a < stop and b > start]
        generated = [(max(a, start) - start, min(b, stop) - start) for a, b in self.generated if a < stop and b > start]
        return Rendered(str.__getitem__(self, slice(start, stop)), runs, generated)

    def own(self) -> str:
        """The text with NUL in place of each character that is not the template's own; white space stays."""
        parts, at = [], 0
        for start, end, _ in self.runs:
            theirs = str.__getitem__(self, slice(start, end))
            parts += [str.__getitem__(self, slice(at, start)), re.sub(r"\S", "\0", theirs)]
            at = end
        return "".join([*parts, str.__getitem__(self, slice(at, None))])


def join(parts: Iterable[str]) -> str:
    """One string of several, each with its sources."""
    parts = list(parts)
    text = "".join(parts)
    runs: list[Run] = []
    generated: list[tuple[int, int]] = []
    at = 0
    for part in parts:
        if isinstance(part, Rendered):
            for start, end, source in part.runs:
                if runs and runs[-1][1:] == (at + start, source):
                    runs[-1] = (runs[-1][0], at + end, source)
                else:
                    runs.append((at + start, at + end, source))
            generated += [(at + start, at + end) for start, end in part.generated]
        at += len(part)
    return Rendered(text, runs, generated) if runs or generated else text


def taint(value: Any, *origins: Any) -> Any:
    """The value with its strings marked as made from those in `origins`, where the place of each is not known.

    What already knows its sources keeps them.
    """
    sources = _sources(origins)
    return mark(value, sources.pop() if len(sources) == 1 else SEVERAL) if sources else value


def _sources(value: Any) -> set[int]:
    match value:
        case Rendered():
            return {source for _, _, source in value.runs}
        case dict():
            return set[int]().union(*map(_sources, value), *map(_sources, value.values()))
        case list() | tuple():
            return set[int]().union(*map(_sources, value))
    return set()


def mark(value: Any, source: int) -> Any:
    """The value with its strings marked as those of a message; what already knows its sources keeps them."""
    match value:
        case Rendered():
            return value
        case str():
            return Rendered(value, [(0, len(value), source)] if value else ())
        case list():
            return [mark(item, source) for item in value]
        case tuple():
            return tuple(mark(item, source) for item in value)
        case dict():
            return {key: mark(item, source) for key, item in value.items()}
    return value


METHODS: Final = frozenset({
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower", "isnumeric",
    "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
})  # fmt: skip


def apply_method(text: str, name: str, *arguments: Any) -> Any:
    """`text.name(*arguments)` with the sources kept, for a name in `METHODS`.

    Where it is not clear which character of the result came from where, all of them count as text of the message.
    """
    result = getattr(str, name)(text, *arguments)
    match name:
        case "join":
            return join([piece for part in arguments[0] for piece in (text, part)][1:])
        case "replace" if arguments[0]:
            old, new, *count = arguments
            return join([piece for part in _split(text, text.split(old, *count), old) for piece in (new, part)][1:])
        case _ if not isinstance(text, Rendered):
            return taint(result, *arguments)
        case "split" | "rsplit" if arguments and arguments[0]:
            return _split(text, result, arguments[0])
        case "strip" | "lstrip":
            start = len(text) - len(str.lstrip(text, *arguments))
            return text.cut(start, start + len(result))
        case "removeprefix":
            return text.cut(len(text) - len(result), len(text))
        case "rstrip" | "removesuffix":
            return text.cut(0, len(result))
        case "upper" | "lower" | "title" | "capitalize" if len(result) == len(text):
            return Rendered(result, text.runs, text.generated)
    return taint(result, text, *arguments)


def _split(text: str, parts: list[str], separator: str) -> list[str]:
    """The parts with their sources."""
    at, found = 0, list[str]()
    for part in parts:
        found.append(text[at : at + len(part)])
        at += len(part) + len(separator)
    return found
