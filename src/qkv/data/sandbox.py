"""Runs chat templates, which come with models from anywhere: the one module that imports jinja2.

Jinja's own `ImmutableSandboxedEnvironment` keeps a template from Python's insides. Added are text that keeps its
sources (`qkv.data.rendered`), and a limit of time and of what operators, calls, filters and literals make.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, cast, final

import jinja2
from jinja2 import filters, nodes, tests
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from qkv.data.rendered import METHODS, Rendered, apply_method, join, taint
from qkv.errors import ConfigError, FileError, QkvError

MAX_SOURCE: Final = 1 << 16  # characters
_ITEM: Final = 16  # of a list counts as much as so many characters
_ROOM: Final = 1 << 22  # characters that a rendering may make, and for each that it is given:
_ROOM_OF_CHARACTER: Final = 100
_SECONDS: Final = 1.0  # that it may compute, and for each character that it is given:
_SECONDS_OF_CHARACTER: Final = 1e-5
_MAX_RANGE: Final = 100_000
_MAX_BITS: Final = 4096  # of an integer
_NEEDLE: Final = 256  # characters, from which on searching may take the product of both lengths

# Names with a space in front cannot be written in a template.
_TURNS, _COUNTED, _CONCATENATED, _GENERATED = " turns", " counted", " ~", " generation"


@dataclass
class _Limits:
    """What a rendering may still use: `room` in characters, and `until` on the thread's clock."""

    room: int
    until: float


_limits: ContextVar[_Limits] = ContextVar("limits")


def _spend(size: int) -> None:
    limits = _limits.get()
    limits.room -= size
    if limits.room < 0 or time.thread_time() > limits.until:
        raise _too_much()


def _too_much() -> FileError:
    return FileError("the chat template takes more time or memory than a template may; use another one")


def _unusable(error: BaseException) -> FileError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return FileError(f"the chat template cannot be used: {reason}; use another one, or other messages")


def compile_template(source: str) -> Callable[[Mapping[str, Any]], Rendered]:
    """What renders a template, from the values of its variables.

    Raises:
        FileError: The template is too long, does not compile, or has a statement that is not allowed. When it is
            rendered: it does what a template may not, or takes too much time or memory.
        ConfigError: When it is rendered: it says that it is not made for such messages.
    """
    environment = _Environment()
    try:
        if len(source) > MAX_SOURCE:
            raise SecurityError(f"it has {len(source)} characters and may have {MAX_SOURCE}")
        tree = _Hooks().visit(environment.parse(source))
        return functools.partial(_render, environment.from_string(tree))
    except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise _unusable(error) from None


def _render(template: jinja2.Template, values: Mapping[str, Any]) -> Rendered:
    given = _size(values)
    limits = _Limits(_ROOM + _ROOM_OF_CHARACTER * given, time.thread_time() + _SECONDS + _SECONDS_OF_CHARACTER * given)
    token = _limits.set(limits)
    try:
        text = _concat(template.root_render_func(template.new_context(dict(values))))
    except QkvError:
        raise
    except RecursionError:
        raise _too_much() from None
    except Exception as error:  # whatever a stranger's program runs into
        raise _unusable(error) from None
    finally:
        _limits.reset(token)
    return text if isinstance(text, Rendered) else Rendered(text)


# --- the syntax tree: what Jinja has no hook for ----------------------------------------------------------------------

_STATEMENTS: Final = (
    nodes.Template, nodes.Output, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.Assign,
    nodes.AssignBlock, nodes.ExprStmt, nodes.With, nodes.Continue, nodes.Break,
)  # fmt: skip


@final
class _Hooks(NodeTransformer):
    """Refuse what is not on the list; count the turns of loops and what literals hold; let `~` keep sources."""

    def generic_visit(self, node: Any, *_: Any, **__: Any) -> Any:
        if isinstance(node, nodes.Stmt) and not isinstance(node, _STATEMENTS):
            raise SecurityError(f"it has {{% {type(node).__name__.lower()} %}}, which a chat template may not")
        if isinstance(node, nodes.Name) and node.name in ("varargs", "kwargs"):  # lists that nothing here counts
            raise SecurityError(f"it uses {node.name!r}, which a chat template may not")
        return super().generic_visit(node)

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        node.iter = _filter(cast(nodes.Expr, node.iter), _TURNS)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        return _filter(nodes.List(self.generic_visit(node).nodes), _CONCATENATED)

    def visit_List(self, node: nodes.Expr) -> nodes.Filter:  # noqa: N802
        return _filter(self.generic_visit(node), _COUNTED)

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        return self.visit_List(node) if node.ctx == "load" else self.generic_visit(node)


def _filter(value: nodes.Expr | None, name: str) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None)


@final
class _Generation(Extension):
    """`{% generation %}`: what stands inside is what the model writes."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.FilterBlock(body, _filter(None, _GENERATED)).set_lineno(line)


# --- the environment --------------------------------------------------------------------------------------------------


def _concat(parts: Any) -> str:
    return join(map(_counted, parts))


@final
class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    concat = staticmethod(_concat)  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_finalize,
            optimized=False,  # nothing is computed while it compiles: there are no limits then
            cache_size=0,
        )
        self.filters, self.tests, self.globals = cast(Any, _FILTERS), cast(Any, _TESTS), dict(_GLOBALS)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`; text has the methods that keep its sources, and no others."""
        if isinstance(obj, str) and attribute in METHODS:
            return lambda *arguments: _call_method(obj, attribute, *arguments)
        if isinstance(obj, str | int | float):
            return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, str | int | float) and isinstance(argument, str):
            return self.getattr(obj, argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        return _counted(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        match operator, left, right:
            case "+", str(), str():
                return _concat([left, right])
            case "*", (str() | list() | tuple()), int():
                _spend(_size(left) * max(right, 0))
                return join([left] * right) if isinstance(left, str) else left * right
            case "*", int(), (str() | list() | tuple()):
                return self.call_binop(context, operator, right, left)
            case "%", str(), _:
                if not re.fullmatch(r"(?:[^%]|%[sd%])*", left):
                    raise SecurityError("it formats with more than %s and %d")
                _spend(_size(left) + _size(right))
                return taint(left % right, left, right)
            case "**", int(), int() if left.bit_length() * right > _MAX_BITS:
                raise _too_much()
        return _counted(super().call_binop(context, operator, left, right))


def _call_method(text: str, name: str, *arguments: Any) -> Any:
    """A method of text; one that could write or search without end is paid for first."""
    needles = sum(len(argument) // _NEEDLE for argument in arguments if isinstance(argument, str))
    _spend(_ITEM + len(text) * (1 + needles))
    match name, arguments:
        case "join", (parts,):
            arguments = (list(parts),)
            _spend((_ITEM + len(text)) * len(arguments[0]))
        case "replace", (str(old), str(new), *_):
            _spend(text.count(old) * (_ITEM + len(new)))
    return _counted(apply_method(text, name, *arguments))


def _size(value: Any) -> int:
    """Characters in a value, what it holds included; what is not data is refused."""
    match value:
        case str():
            return _ITEM + len(value)
        case list() | tuple():
            return _ITEM + sum(map(_size, value))
        case dict():
            return _ITEM + sum(map(_size, value)) + sum(map(_size, value.values()))
        case int() if value.bit_length() > _MAX_BITS:
            raise _too_much()
        case None | int() | float() | range() | jinja2.Undefined():
            return _ITEM
    raise SecurityError(f"it uses a {type(value).__name__} as if it were data")


def _counted(value: Any) -> Any:
    """The value, once there is room for it."""
    if isinstance(value, str | int | list | tuple | dict):
        _spend(_size(value))
    return value


def _turns(values: Any) -> Iterator[Any]:
    """What a loop goes through."""
    for value in values:
        _spend(_ITEM)
        yield value


def _written(value: Any) -> str:
    """The value as text."""
    if isinstance(value, str):
        return value
    _spend(_size(value))
    return taint(str(value), value)


@jinja2.pass_context
def _finalize(_: Context, value: Any) -> str:
    return _written(value)


def _generated(text: str) -> Rendered:
    return Rendered(text, text.runs if isinstance(text, Rendered) else (), [(0, len(text))])


# --- filters, tests and functions -------------------------------------------------------------------------------------


def _counting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter; numbers that it is given, such as a width, multiply what it may make."""
    at = int(hasattr(function, "jinja_pass_arg"))  # then the first argument is Jinja's context

    @functools.wraps(function)
    def apply(*arguments: Any, **options: Any) -> Any:
        value, given = arguments[at], [*arguments[at + 1 :], *options.values()]
        times = 1 + sum(max(number, 0) for number in given if isinstance(number, int))
        _spend(_ITEM * times * (len(value) if isinstance(value, str) else 1))
        result = function(*arguments, **options)
        return _counted(taint(list(_turns(result)) if hasattr(result, "__next__") else result, *arguments[at:]))

    return apply


def _method(name: str) -> Callable[..., Any]:
    return lambda value, *arguments: _call_method(_written(value), name, *arguments)


def _as_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: characters as they are, and nothing made safe for HTML."""
    _spend(_size(value) * _size(separators) // _ITEM * (1 + (indent or 0)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_FILTERS: Final[dict[str, Callable[..., Any]]] = {
    **{name: filters.FILTERS[name] for name in ("count", "d", "default", "length")},
    **{name: _counting(filters.FILTERS[name]) for name in (
        "abs", "dictsort", "first", "float", "indent", "int", "items", "last", "list", "map", "max", "min", "reject",
        "rejectattr", "reverse", "select", "selectattr", "sort", "unique",
    )},
    **{name: _method(name) for name in ("capitalize", "lower", "replace", "title", "upper")},
    "join": lambda values, separator="": _call_method(separator, "join", [_written(value) for value in _turns(values)]),
    "safe": _written,  # nothing is escaped here
    "string": _written,
    "tojson": _counting(_as_json),
    "trim": _method("strip"),
    _CONCATENATED: lambda parts: _concat(map(_written, parts)),
    _COUNTED: _counted,
    _GENERATED: _generated,
    _TURNS: _turns,
}  # fmt: skip


def _only(kind: type, name: str) -> Callable[..., bool]:
    return lambda *values: all(isinstance(value, kind) for value in values) and tests.TESTS[name](*values)


_TESTS: Final[dict[str, Callable[..., Any]]] = {
    **tests.TESTS,
    **{name: _only(int, name) for name in ("divisibleby", "even", "odd")},  # of a text they would format it
    **{name: _only(str, name) for name in ("lower", "upper")},
}


def _raise(message: Any) -> None:
    raise ConfigError(f"the chat template does not take these messages: {_written(message)[:300]}; change them")


def _now(form: str) -> str:
    if len(form) > 100 or not re.fullmatch(r"(?:[^%]|%-?[a-zA-Z%])*", form):  # `%999d` would be as wide as that
        raise SecurityError("it asks for the date in a form that a chat template may not")
    return datetime.now().strftime(form)


def _range(*limits: int) -> range:
    found = range(*limits)
    if len(found) > _MAX_RANGE:
        raise _too_much()
    return found


_GLOBALS: Final[dict[str, Any]] = {
    "dict": dict, "namespace": Namespace, "raise_exception": _raise, "range": _range, "strftime_now": _now
}  # fmt: skip
