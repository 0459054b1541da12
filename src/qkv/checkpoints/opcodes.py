"""The plain data in a foreign pickle, read without unpickling it: nothing in the file is imported, called or built.

A pickle is a program for a small machine. Here only the instructions that write down plain data are carried out; what
others would make is an opaque mark. A list may stand in itself, or twice in each of fifty others: what is returned is a
tree of bounded depth, so that whoever compares, hashes or prints it takes no more time than the file has bytes.
"""

import pickletools
from pathlib import Path
from typing import Any, Final, final

from qkv.errors import FileError

MAX_BYTES: Final = 1 << 26
MAX_INSTRUCTIONS: Final = 1 << 19  # about a second
MAX_DEPTH: Final = 8  # of dicts, lists and tuples in one another


@final
class Opaque:
    """Stands where the pickle would import, call or build something."""


_OPAQUE, _MARK = Opaque(), object()
_VALUES = frozenset(
    {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE"}
)
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_plain(path: Path) -> dict[str, Any]:
    """The dict that a pickle of protocol 2 or later holds; arrays and other objects in it are `Opaque`.

    Raises:
        FileError: The file is missing, too large, or not such a pickle.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FileError(
                f"{path}: has {path.stat().st_size} bytes, more than {MAX_BYTES}; give the model's own file"
            )
        data = path.read_bytes()
        found = _run(data)
        _check_tree(found, len(data))
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:100]
        raise FileError(f"{path}: no pickle of plain data ({reason}); get the model again") from None
    if not isinstance(found, dict):
        raise FileError(f"{path}: holds a {type(found).__name__} and must hold a dict; get the model again")
    return found


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for n, (op, argument, _) in enumerate(pickletools.genops(data)):
        name = op.name
        if n > MAX_INSTRUCTIONS:
            raise ValueError(f"more than {MAX_INSTRUCTIONS} instructions")
        if name in _VALUES:
            stack.append(_CONSTANTS.get(name, argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[int(argument)] = stack[-1]  # pyright: ignore[reportArgumentType] - these have a number
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])  # pyright: ignore[reportArgumentType]
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            _act(name, stack)
    raise ValueError("it has no end")


def _act(name: str, stack: list[Any]) -> None:
    """One instruction that takes from the stack."""
    if name in ("EMPTY_DICT", "EMPTY_LIST"):
        stack.append({} if name == "EMPTY_DICT" else [])
    elif name == "MARK":
        stack.append(_MARK)
    elif name in _TUPLES:
        n = _TUPLES[name]
        items = [stack.pop() for _ in range(n)]
        stack.append(tuple(reversed(items)))
    elif name == "TUPLE":
        stack.append(tuple(_to_mark(stack)))
    elif name == "APPENDS":
        stack[-1 - _depth(stack)].extend(_to_mark(stack))
    elif name == "SETITEMS":
        items = _to_mark(stack)
        if not all(key is None or isinstance(key, str | int | float) for key in items[::2]):  # a tuple may be huge
            raise ValueError("a key is no text and no number")
        stack[-1].update(zip(items[::2], items[1::2], strict=True))
    elif name == "GLOBAL":
        stack.append(_OPAQUE)
    elif name in ("REDUCE", "BUILD"):
        stack.pop()
        if name == "REDUCE":
            stack[-1] = _OPAQUE
    else:
        raise ValueError(f"the instruction {name} is not for plain data")


def _depth(stack: list[Any]) -> int:
    """Items above and with the last mark."""
    for i, item in enumerate(reversed(stack), start=1):
        if item is _MARK:
            return i
    raise ValueError("a mark is missing")


def _to_mark(stack: list[Any]) -> list[Any]:
    """Take what is above the last mark, and the mark."""
    n = _depth(stack)
    items = stack[len(stack) - n + 1 :]
    del stack[len(stack) - n :]
    return items


def _check_tree(found: Any, at_most: int) -> None:
    """Raise a `ValueError` where it is deeper than `MAX_DEPTH`, or has more values than `at_most`."""
    level, n = [found], 0
    for _ in range(MAX_DEPTH):
        held: list[Any] = []
        for value in level:
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            n += len(inner)
            if n > at_most:
                raise ValueError("a part of it stands in too many places")
            held += inner
        level = held
    if level:
        raise ValueError(f"more than {MAX_DEPTH} levels of lists")
