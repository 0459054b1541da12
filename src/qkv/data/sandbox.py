"""Runs chat templates, which come with models from anywhere: the one module that imports jinja2.

Jinja's own `ImmutableSandboxedEnvironment` keeps a template from Python's insides. Three things are added here.

* Text keeps its sources (`qkv.data.rendered`): text has its own methods and operators, and filters mark their results.
* Size: what operators, calls, filters and literals make is counted, before it is made where it could be huge.
* Time: the same places, and each turn of a loop, look at the thread's clock.
"""

import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Final, cast, final

import jinja2
from jinja2 import filters, nodes, tests
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from qkv.data.rendered import METHODS, Rendered, apply_method, join, taint

MAX_SOURCE: Final = 1 << 16  # characters
_ITEM: Final = 16  # of a list counts as much as so many characters
_ROOM: Final = 1 << 22  # characters that a rendering may make, and for each that it is given:
_ROOM_OF_CHARACTER: Final = 100
_SECONDS: Final = 1.0  # that it may compute, and for each character that it is given:
_SECONDS_OF_CHARACTER: Final = 1e-5
_MAX_RANGE: Final = 100_000
_MAX_BITS: Final = 4096  # of an integer
_MAX_INDENT: Final = 16  # spaces
_MAX_NEEDLE: Final = 256  # characters, where Python's search takes the product of both lengths

# Names with a space in front cannot be written in a template.
_TURNS, _COUNTED, _CONCATENATED, _GENERATED = " turns", " counted", " ~", " generation"


class RaisedError(Exception):
    """What a template says with `raise_exception`: it is not made for such messages."""


class RefusedError(Exception):
    """The template does what a template may not."""


class TooMuchError(Exception):
    """The template takes more time or memory than a template may."""


@final
class _Limits:
    """What a rendering may still use: `room` in characters, and `until` on the thread's clock."""

    def __init__(self, given: int) -> None:
        self.room = _ROOM + _ROOM_OF_CHARACTER * given
        self.until = time.thread_time() + _SECONDS + _SECONDS_OF_CHARACTER * given


_limits: ContextVar[_Limits] = ContextVar("limits")


def _spend(size: int) -> None:
    limits = _limits.get()
    limits.room -= size
    if limits.room < 0 or time.thread_time() > limits.until:
        raise TooMuchError


def compile_template(source: str) -> Callable[[Mapping[str, Any]], Rendered]:
    """What renders a template, from the values of its variables.

    Raises:
        RefusedError: The template is too long, does not compile, or has a statement that is not allowed.
    """
    if len(source) > MAX_SOURCE:
        raise RefusedError(f"it has {len(source)} characters and may have {MAX_SOURCE}")
    environment = _Environment()
    try:
        tree = environment.parse(source)
        _prepare(tree)
        return functools.partial(_render, environment.from_string(tree))
    except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise RefusedError(_line(error)) from None


def _render(template: jinja2.Template, values: Mapping[str, Any]) -> Rendered:
    token = _limits.set(_Limits(_size(values)))
    try:
        text = _concat(_turns(template.root_render_func(template.new_context(dict(values)))))
    except (RefusedError, TooMuchError, RaisedError):
        raise
    except RecursionError:
        raise TooMuchError from None
    except Exception as error:  # whatever a stranger's program runs into
        raise RefusedError(_line(error)) from None
    finally:
        _limits.reset(token)
    return text if isinstance(text, Rendered) else Rendered(text)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# --- the syntax tree: what Jinja has no hook for ----------------------------------------------------------------------

_STATEMENTS: Final = (
    nodes.Template, nodes.Output, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.Assign,
    nodes.AssignBlock, nodes.ExprStmt, nodes.With, nodes.Continue, nodes.Break,
)  # fmt: skip


def _prepare(tree: nodes.Template) -> None:
    """Refuse what is not on the list; count the turns of loops and what literals hold; let `~` keep sources."""
    for node in [*reversed(list(tree.find_all(nodes.Node))), tree]:  # the leaves first
        if isinstance(node, nodes.Stmt) and not isinstance(node, _STATEMENTS):
            raise RefusedError(f"it has {{% {type(node).__name__.lower()} %}}, which a chat template may not")
        if isinstance(node, nodes.Name) and node.name in ("varargs", "kwargs"):  # lists that nothing here counts
            raise RefusedError(f"it uses {node.name!r}, which a chat template may not")
        for field, value in node.iter_fields():
            setattr(node, field, [*map(_hooked, value)] if isinstance(value, list) else _hooked(value))
        if isinstance(node, nodes.For):
            node.iter = _filter(cast(nodes.Expr, node.iter), _TURNS)


def _hooked(node: Any) -> Any:
    if isinstance(node, nodes.Concat):
        return _filter(nodes.List(node.nodes), _CONCATENATED)
    if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return _filter(node, _COUNTED)
    return node


def _filter(value: nodes.Expr | None, name: str) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None)


@final
class _Generation(Extension):
    """`{% generation %}`: what stands inside is what the model writes."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """A block whose text goes through a filter that marks it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.FilterBlock(body, _filter(None, _GENERATED)).set_lineno(line)


# --- the environment --------------------------------------------------------------------------------------------------


def _concat(parts: Any) -> str:
    parts = list(parts)
    _spend(sum(map(len, parts)))
    return join(parts)


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
        self.filters = cast(Any, _FILTERS)
        self.tests = cast(Any, _TESTS)
        self.globals = dict(_GLOBALS)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`; text has the methods that keep its sources, and no others."""
        if isinstance(obj, str) and attribute in METHODS:
            return lambda *arguments: _call_method(obj, attribute, *arguments)
        if isinstance(obj, str | int | float):
            return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`."""
        _spend(_ITEM)
        if isinstance(obj, str | int | float) and isinstance(argument, str):
            return self.getattr(obj, argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """`obj(...)`."""
        _spend(_ITEM)
        return _counted(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`."""
        _spend(_ITEM)
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
                    raise RefusedError("it formats with more than %s and %d")
                _spend(_size(left) + _size(right))
                return taint(left % right, left, right)
            case "**", int(), int() if left.bit_length() * right > _MAX_BITS:
                raise TooMuchError
        return _counted(super().call_binop(context, operator, left, right))


def _call_method(text: str, name: str, *arguments: Any) -> Any:
    """A method of text; one that could write or search without end is paid for first."""
    _spend(_ITEM + len(text))
    match name, arguments:
        case "join", (parts,):
            arguments = (list(parts),)
            _spend((_ITEM + len(text)) * len(arguments[0]))
        case "replace", (str(old), str(new), *_):
            _spend(text.count(old) * (_ITEM + len(new)))
        case "strip" | "lstrip" | "rstrip" | "rfind" | "rsplit" | "rpartition", (str(needle), *_) if (
            len(needle) > _MAX_NEEDLE
        ):
            raise TooMuchError
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
            raise TooMuchError
        case None | int() | float() | range() | jinja2.Undefined():
            return _ITEM
    raise RefusedError(f"it uses a {type(value).__name__} as if it were data")


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


def _jinjas(name: str) -> Callable[..., Any]:
    """Jinja's own filter, where its result is not much larger than what it reads."""
    theirs: Any = filters.FILTERS[name]
    at = int(hasattr(theirs, "jinja_pass_arg"))  # then the first argument is Jinja's context

    @functools.wraps(theirs)
    def apply(*arguments: Any, **options: Any) -> Any:
        value = arguments[at]
        _spend(_ITEM + _ITEM * (len(value) if isinstance(value, str) else 0))  # a list of its characters
        result = theirs(*arguments, **options)
        return _counted(taint(list(_turns(result)) if hasattr(result, "__next__") else result, *arguments[at:]))

    return apply


def _method(name: str) -> Callable[..., Any]:
    return lambda value, *arguments: _call_method(_written(value), name, *arguments)


def _joined(values: Any, separator: str = "") -> str:
    return _call_method(separator, "join", [_written(value) for value in _turns(values)])


def _indented(value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    if type(width) is not int or not 0 <= width <= _MAX_INDENT:
        raise RefusedError(f"it indents by other than 0 to {_MAX_INDENT} spaces")
    return _jinjas("indent")(_written(value), width, first, blank)


def _as_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: characters as they are, and nothing made safe for HTML."""
    if indent is not None and (type(indent) is not int or not 0 <= indent <= _MAX_INDENT):
        raise RefusedError(f"it indents JSON by other than 0 to {_MAX_INDENT} spaces")
    _spend((_size(value) + _size(separators)) * (1 + (indent or 0)))
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _counted(taint(text, value))


_FILTERS: Final[dict[str, Callable[..., Any]]] = {
    **{name: filters.FILTERS[name] for name in ("count", "d", "default", "length")},
    **{name: _jinjas(name) for name in (
        "abs", "dictsort", "first", "float", "int", "items", "last", "list", "map", "max", "min", "reject",
        "rejectattr", "reverse", "select", "selectattr", "sort", "unique",
    )},
    **{name: _method(name) for name in ("capitalize", "lower", "replace", "title", "upper")},
    "indent": _indented,
    "join": _joined,
    "safe": _written,  # nothing is escaped here
    "string": _written,
    "tojson": _as_json,
    "trim": _method("strip"),
    _CONCATENATED: lambda parts: _concat([_written(part) for part in parts]),
    _COUNTED: _counted,
    _GENERATED: _generated,
    _TURNS: _turns,
}  # fmt: skip


def _only(kind: type, name: str) -> Callable[..., bool]:
    return lambda *values: all(isinstance(value, kind) for value in values) and tests.TESTS[name](*values)


_TESTS: Final[dict[str, Callable[..., Any]]] = {
    **{name: tests.TESTS[name] for name in (
        "!=", "<", "<=", "==", ">", ">=", "boolean", "defined", "eq", "equalto", "false", "float", "ge", "greaterthan",
        "gt", "in", "integer", "iterable", "le", "lessthan", "lt", "mapping", "ne", "none", "number", "sameas",
        "sequence", "string", "true", "undefined",
    )},
    **{name: _only(int, name) for name in ("divisibleby", "even", "odd")},
    **{name: _only(str, name) for name in ("lower", "upper")},
}  # fmt: skip


def _raise(message: Any) -> None:
    raise RaisedError(_written(message)[:300])


def _now(form: str) -> str:
    """The date; a width in a directive (`%999d`) would make it as long as that."""
    if len(form) > 100 or not re.fullmatch(r"(?:[^%]|%-?[a-zA-Z%])*", form):
        raise RefusedError("it asks for the date in a form that a chat template may not")
    return datetime.now().strftime(form)


def _range(*limits: int) -> range:
    found = range(*limits)
    if len(found) > _MAX_RANGE:
        raise TooMuchError
    return found


_GLOBALS: Final[dict[str, Any]] = {
    "dict": dict, "namespace": Namespace, "raise_exception": _raise, "range": _range, "strftime_now": _now
}  # fmt: skip
