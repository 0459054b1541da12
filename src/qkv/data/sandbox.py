"""Runs chat templates, which come with models from anywhere: the one module that imports jinja2.

Jinja's own `ImmutableSandboxedEnvironment` keeps a template from Python's insides. Added are text that keeps its
sources (`qkv.data.rendered`), and a limit of time and of the characters that a rendering may make.
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
from jinja2 import filters, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
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
_NEEDLE: Final = 256  # characters, from which on searching may take the product of both lengths

# Names with a space in front cannot be written in a template.
_TURNS, _MADE, _CONCATENATED, _GENERATED = " turns", " made", " ~", " generation"


@dataclass
class _Limits:
    """What a rendering may still use: `room` in characters, and `until` on the thread's clock."""

    room: int
    until: float


_limits: ContextVar[_Limits] = ContextVar("limits")


def _spend(size: int) -> None:
    """Pay for so many characters before they are made."""
    limits = _limits.get()
    limits.room -= max(size, 0)
    if limits.room < 0 or time.thread_time() > limits.until:
        raise _too_much()


def _made(value: Any) -> Any:
    """The value, once all that it holds is paid for; what is not data is refused."""
    match value:
        case str():
            _spend(_ITEM + len(value))
        case list() | tuple():
            _spend(_ITEM)
            for item in value:
                _made(item)
        case dict():
            _made([*value, *value.values()])
        case int():
            _spend(_ITEM + value.bit_length())
        case None | float() | range() | jinja2.Undefined():
            _spend(_ITEM)
        case _:
            raise SecurityError(f"it uses a {type(value).__name__} as if it were data")
    return value


def _too_much() -> FileError:
    return FileError("the chat template takes more time or memory than a template may; use another one")


def _unusable(error: BaseException) -> FileError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return FileError(f"the chat template cannot be used: {reason}; use another one, or other messages")


def compile_template(source: str) -> Callable[[Mapping[str, Any]], Rendered]:
    """What renders a template, from the values of its variables.

    Raises:
        FileError: The template is too long or does not compile. When it is rendered: it does what a template may not,
            or takes too much time or memory.
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
    given = len(json.dumps(values))
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


@final
class _Hooks(NodeTransformer):
    """Pay for the turns of loops and what literals hold; let `~` keep sources."""

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> Any:  # noqa: N802
        raise SecurityError("it has {% autoescape %}, which would lose where its text comes from")

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        node.iter = _filter(cast(nodes.Expr, node.iter), _TURNS)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), _CONCATENATED)

    def visit_List(self, node: nodes.Expr) -> nodes.Filter:  # noqa: N802
        return _filter(cast(nodes.Expr, self.generic_visit(node)), _MADE)

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:  # noqa: N802
        return self.visit_List(node) if node.ctx == "load" else cast(nodes.Expr, self.generic_visit(node))


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
    return join(map(_made, parts))


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
        self.filters, self.globals = cast(Any, _FILTERS), dict(_GLOBALS)

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
        value = super().call(__context, __obj, *args, **kwargs)
        return _made(value) if isinstance(value, str | int | list | tuple | dict) else value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        match operator, left, right:
            case "+", str(), str():
                return _concat([left, right])
            case "*", int(), (str() | list() | tuple()):
                return self.call_binop(context, operator, right, left)
            case "*", (str() | list() | tuple()), int():
                _spend(_ITEM * len(left) * right)
                return join([left] * right) if isinstance(left, str) else _made(left * right)
            case "%", str(), _:
                if not re.fullmatch(r"(?:[^%]|%[sd%])*", left):
                    raise SecurityError("it formats with more than %s and %d")
                return taint(_made(left % right), left, right)
            case "**", int(), int():
                _spend(left.bit_length() * right)
        return _made(super().call_binop(context, operator, left, right))


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
    return _made(apply_method(text, name, *arguments))


def _turns(values: Any) -> Iterator[Any]:
    """What a loop goes through."""
    for value in values:
        _spend(_ITEM)
        yield value


def _written(value: Any) -> str:
    """The value as text."""
    return value if isinstance(value, str) else taint(str(_made(value)), value)


@jinja2.pass_context
def _finalize(_: Context, value: Any) -> str:
    return _written(value)


def _generated(text: str) -> Rendered:
    return Rendered(text, text.runs if isinstance(text, Rendered) else (), [(0, len(text))])


# --- filters and functions --------------------------------------------------------------------------------------------


def _keeping(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, which keeps sources; numbers that it is given, such as a width, multiply what it may make."""
    at = int(hasattr(function, "jinja_pass_arg"))  # then the first argument is Jinja's context

    @functools.wraps(function)
    def apply(*arguments: Any, **options: Any) -> Any:
        value, given = arguments[at], [*arguments[at + 1 :], *options.values()]
        times = 1 + sum(max(number, 0) for number in given if isinstance(number, int))
        _spend(_ITEM * times * (len(value) if isinstance(value, str) else 1))
        result = function(*arguments, **options)
        return _made(taint(list(_turns(result)) if hasattr(result, "__next__") else result, *arguments[at:]))

    return apply


def _method(name: str) -> Callable[..., Any]:
    return lambda value, *arguments: _call_method(_written(value), name, *arguments)


def _as_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: characters as they are, and nothing made safe for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_FILTERS: Final[dict[str, Callable[..., Any]]] = {
    **{name: filters.FILTERS[name] for name in ("count", "d", "default", "length")},
    **{name: _keeping(filters.FILTERS[name]) for name in (
        "abs", "dictsort", "first", "float", "indent", "int", "items", "last", "list", "map", "max", "min", "reject",
        "rejectattr", "reverse", "select", "selectattr", "sort", "unique",
    )},
    **{name: _method(name) for name in ("capitalize", "lower", "replace", "title", "upper")},
    "join": lambda values, separator="": _call_method(separator, "join", [_written(value) for value in _turns(values)]),
    "safe": _written,  # nothing is escaped here
    "string": _written,
    "tojson": _keeping(_as_json),
    "trim": _method("strip"),
    _CONCATENATED: lambda parts: _concat(map(_written, parts)),
    _MADE: _made,
    _GENERATED: _generated,
    _TURNS: _turns,
}  # fmt: skip


def _raise(message: Any) -> None:
    raise ConfigError(f"the chat template does not take these messages: {_written(message)[:300]}; change them")


_GLOBALS: Final[dict[str, Any]] = {
    "dict": dict,
    "namespace": lambda *pairs, **values: Namespace(_made(dict(*pairs, **values))),
    "raise_exception": _raise,
    "range": safe_range,
    "strftime_now": lambda form: datetime.now().strftime(form),
}
