"""What a chat template may do with values: a short list of methods and filters, each paid for before it is done.

A template comes with a model from anywhere, so it is hostile. Three things hold for everything here.

* It is on the list, or it is refused.
* It is charged to a `Budget` before it is done. The budget counts work, not time by the clock: a template that is
  accepted once is accepted on a slow machine too. A string or list that is passed on is paid for by its size, what it
  holds included, so that no value can grow beyond what was paid.
* Strings keep their sources (`qkv.data.rendered`), or are taken for text of a message as a whole.
"""

import json
import operator
import re
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from types import NoneType
from typing import Any, Final, final

from qkv.data.rendered import Rendered, join, taint

STEP: Final = 1000  # nanoseconds, roughly: one step of a template
ITEM: Final = 300  # one item of a list
CHARACTER: Final = 10  # one character

_DEPTH: Final = 32  # of lists in lists
_BITS: Final = 4096  # of an integer
_INDENT: Final = 16  # spaces, of JSON and of `indent`


class RefusedError(Exception):
    """The template does what a template may not."""


class TooMuchError(Exception):
    """The template takes more work, or writes more, than a template may."""


@final
class Budget:
    """What a rendering may still cost.

    Attributes:
        left: Nanoseconds of work (estimated).
        depth: Macros that are being called inside one another.
    """

    def __init__(self, left: int) -> None:
        self.left, self.depth = left, 0


class Missing:
    """Base of what stands for a value that is not there."""

    __slots__ = ()


_ATOMS: Final = (NoneType, bool, int, float, Missing)

budget: ContextVar[Budget] = ContextVar("budget")


def charge(cost: int) -> None:
    """Pay for what comes next."""
    purse = budget.get()
    purse.left -= cost
    if cost < 0 or purse.left < 0:
        raise TooMuchError


def weigh(*values: Any) -> None:
    """Pay for reading values, all that they hold included."""
    stack: list[tuple[Collection[Any], int]] = [(values, 0)]
    while stack:
        held, depth = stack.pop()
        charge(ITEM * (1 + len(held)))
        if depth > _DEPTH:
            raise RefusedError(f"it puts lists into one another, more than {_DEPTH} deep")
        for value in held:
            if isinstance(value, str):
                charge(_size(value))
            elif isinstance(value, list | tuple):
                stack.append((value, depth + 1))
            elif isinstance(value, dict):
                stack += [(value.keys(), depth + 1), (value.values(), depth + 1)]
            elif isinstance(value, range):
                charge(ITEM * len(value))
            elif not isinstance(value, _ATOMS):
                raise RefusedError(f"it uses a {type(value).__name__} as if it were data")


def _size(text: str) -> int:
    return CHARACTER * len(text) + (ITEM * len(text.runs) if isinstance(text, Rendered) else 0)


def written(value: Any) -> str:
    """The value as text."""
    weigh(value)
    return value if isinstance(value, str) else taint(str(value), value)


def concatenated(parts: Sequence[Any]) -> str:
    """The parts as one text."""
    return join([written(part) for part in parts])


# --- operators --------------------------------------------------------------------------------------------------------

_NUMBERS: Final = {"-": operator.sub, "/": operator.truediv, "//": operator.floordiv, "%": operator.mod}
_PLAIN_FORMAT: Final = re.compile(r"(?:[^%]|%[sd%])*")


def operate(symbol: str, left: Any, right: Any) -> Any:
    """A binary operator of a template."""
    match symbol, left, right:
        case "+", str(), str():
            return concatenated([left, right])
        case ("+", list(), list()) | ("+", tuple(), tuple()):
            charge(ITEM * (len(left) + len(right)))
            return type(left)([*left, *right])
        case "*", (str() | list() | tuple()), int():
            return _repeated(left, right)
        case "*", int(), (str() | list() | tuple()):
            return _repeated(right, left)
        case "%", str(), _:
            if not _PLAIN_FORMAT.fullmatch(left):
                raise RefusedError("it formats with more than %s and %d")
            weigh(left, right)
            return taint(left % right, left, right)
        case (("+" | "-" | "*" | "/" | "//" | "%" | "**"), (int() | float()), (int() | float())):
            return _calculated(symbol, left, right)
    raise TypeError(f"{symbol} between a {type(left).__name__} and a {type(right).__name__}")


def _repeated(value: Any, times: int) -> Any:
    charge((ITEM + (_size(value) if isinstance(value, str) else ITEM * len(value))) * max(times, 0))
    return join([value] * times) if isinstance(value, str) else value * times


def _calculated(symbol: str, left: Any, right: Any) -> Any:
    if symbol in _NUMBERS:
        return _NUMBERS[symbol](left, right)
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if symbol == "**" else left.bit_length() + right.bit_length()
        if symbol != "+" and bits > _BITS:
            raise TooMuchError
    return {"+": operator.add, "*": operator.mul, "**": operator.pow}[symbol](left, right)


# --- methods ----------------------------------------------------------------------------------------------------------


def _stripped(text: str, how: Callable[..., str], *characters: Any) -> str:
    """`strip` and its kin: a cut, so the sources stay where they are."""
    if not isinstance(text, Rendered):
        return how(text, *characters)
    kept = how(text, *characters)
    start = len(text) - len(str.lstrip(text, *characters)) if how is not str.rstrip else 0
    return text.cut(start, start + len(kept))


def _split(text: str, how: Callable[..., list[str]], separator: Any = None, maxsplit: Any = -1) -> list[str]:
    parts = how(text, separator, maxsplit)
    charge(ITEM * len(parts))
    if not isinstance(text, Rendered) or not separator:
        return taint(parts, text)
    found, at = [], 0
    for part in parts:
        found.append(text.cut(at, at + len(part)))
        at += len(part) + len(separator)
    return found


def _replaced(text: str, old: str, new: str, count: int = -1) -> str:
    times = text.count(old) if count < 0 else min(text.count(old), count)
    charge(CHARACTER * (len(text) + times * len(new)))
    if not old:
        return taint(text.replace(old, new, count), text, new)
    return _joined(new, _split(text, str.split, old, times))


def _joined(separator: str, parts: Sequence[Any]) -> str:
    parts = list(parts)
    charge(CHARACTER * len(separator) * len(parts))
    weigh(parts)
    if not parts:
        return ""
    pieces = [piece for part in parts for piece in (separator, part)][1:]
    if not all(isinstance(piece, str) for piece in pieces):
        raise TypeError("join takes strings only")
    return join(pieces)


def _cased(text: str, how: Callable[[str], str]) -> str:
    """Another case: where no letter became two, each character keeps its source."""
    changed = how(text)
    if isinstance(text, Rendered) and len(changed) == len(text):
        return Rendered(changed, text.runs, text.generated)
    return taint(changed, text)


def _loosely(how: Callable[..., Any]) -> Callable[..., Any]:
    """A method whose result is no larger than what it reads; text in it counts as text of the message."""
    return lambda value, *arguments: taint(how(value, *arguments), value, *arguments)


def _without(text: str, how: Callable[[str, str], str], affix: str) -> str:
    kept = len(how(text, affix))
    start = len(text) - kept if how is str.removeprefix else 0
    return text[start : start + kept]


def _with(helper: Callable[..., Any], how: Callable[..., Any]) -> Callable[..., Any]:
    return lambda value, *arguments: helper(value, how, *arguments)


_LOOSE = (
    "startswith", "endswith", "find", "rfind", "index", "count", "splitlines", "partition", "rpartition",
    "isdigit", "isalpha", "isalnum", "isspace", "isnumeric", "isupper", "islower",
)  # fmt: skip
_TEXT: dict[str, Callable[..., Any]] = {
    **{name: _loosely(getattr(str, name)) for name in _LOOSE},
    **{name: _with(_stripped, getattr(str, name)) for name in ("strip", "lstrip", "rstrip")},
    **{name: _with(_cased, getattr(str, name)) for name in ("upper", "lower", "title", "capitalize")},
    **{name: _with(_without, getattr(str, name)) for name in ("removeprefix", "removesuffix")},
    "split": _with(_split, str.split),
    "rsplit": _with(_split, str.rsplit),
    "replace": _replaced,
    "join": _joined,
}
_LIST: dict[str, Callable[..., Any]] = {"index": list.index, "count": list.count}
_DICT: dict[str, Callable[..., Any]] = {
    "get": dict.get,
    "items": lambda value: list(value.items()),
    "keys": lambda value: list(value),
    "values": lambda value: list(value.values()),
}


@final
class Method:
    """A method of a value, bound: `message.content.strip`."""

    def __init__(self, value: Any, how: Callable[..., Any]) -> None:
        self._value, self._how = value, how

    def __call__(self, *arguments: Any) -> Any:
        """Pay, and call."""
        if isinstance(self._value, dict):
            charge(ITEM * len(self._value))
        else:
            weigh(self._value)
        weigh(*arguments)
        return self._how(self._value, *arguments)


def method(value: Any, name: str) -> Method | None:
    """The method of that name, if it is on the list."""
    table = {str: _TEXT, Rendered: _TEXT, list: _LIST, dict: _DICT}.get(type(value), {})
    return Method(value, table[name]) if name in table else None


# --- filters that Jinja's own would not bound, or would lose sources in -----------------------------------------------


def text_filter(name: str) -> Callable[..., Any]:
    """A method of strings as a filter."""

    def apply(value: Any, *arguments: Any) -> Any:
        weigh(*arguments)
        return _TEXT[name](written(value), *arguments)

    return apply


def joined(values: Any, separator: str = "") -> str:
    """The filter `join`: any values, as text."""
    values = list(values)
    weigh(values)
    return _joined(separator, [written(value) for value in values])


def indented(value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    """The filter `indent`."""
    if type(width) is not int or not 0 <= width <= _INDENT:
        raise RefusedError(f"it indents by other than 0 to {_INDENT} spaces")
    text = written(value)
    charge(CHARACTER * width * (1 + text.count("\n")))
    lines = text.split("\n")
    rest = [" " * width + line if line.strip() or blank else line for line in lines[1:]]
    return taint("\n".join([" " * width * bool(first) + lines[0], *rest]), text)


def as_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson`, as transformers has it: characters as they are, and nothing made safe for HTML."""
    if indent is not None and (type(indent) is not int or not 0 <= indent <= _INDENT):
        raise RefusedError(f"it indents JSON by other than 0 to {_INDENT} spaces")
    for _ in range(2 + (indent or 0)):  # each item stands on its own line, as far in as it is deep
        weigh(value, separators)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    charge(CHARACTER * len(text))
    return taint(text, value)
