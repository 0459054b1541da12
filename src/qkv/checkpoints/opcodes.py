"""The plain data in a foreign pickle, read without unpickling it: nothing in the file is imported, called or built.

A pickle is a program for a small machine. Here only the instructions that write down plain data are carried out; what
others would make is an opaque mark.
"""

import pickletools
from pathlib import Path
from typing import Any, Final, final

from qkv.errors import FileError

MAX_BYTES: Final = 1 << 26


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
        found = _run(path.read_bytes())
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
    for op, argument, _ in pickletools.genops(data):
        name = op.name
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
    return next(i for i, item in enumerate(reversed(stack), start=1) if item is _MARK)


def _to_mark(stack: list[Any]) -> list[Any]:
    """Take what is above the last mark, and the mark."""
    n = _depth(stack)
    items = stack[len(stack) - n + 1 :]
    del stack[len(stack) - n :]
    return items
