"""Jinja for strangers: the one module that imports jinja2.

Jinja's own `ImmutableSandboxedEnvironment` closes the way to Python's insides, but not to a long wait or a full memory:
`{{ 'a' * 10**9 }}`. Here every attribute, method, filter, test, call and operator goes through a short list
(`qkv.data.guarded`) and a budget. What Jinja gives no hook for is changed in the syntax tree before it is compiled:
loops count what they go through, and lists, comparisons and `~` weigh what they take.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final, cast, final

import jinja2
from jinja2 import filters, nodes, tests
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from qkv.data import guarded
from qkv.data.guarded import ITEM, STEP, Budget, Method, Missing, RefusedError, TooMuchError, budget, charge, weigh
from qkv.data.rendered import Rendered, join, taint

MAX_SOURCE: Final = 1 << 16  # characters
MAX_WORDS: Final = 1 << 13  # names, signs and stretches of text; what compiling takes grows with them
_MAX_CALLS: Final = 40  # macros inside one another
_MAX_RANGE: Final = 100_000
_LOOP: Final = {
    "index", "index0", "first", "last", "length", "revindex", "revindex0", "previtem", "nextitem", "depth", "depth0"
}  # fmt: skip
_DIRECTIVE: Final = "aAbBcdHIjmMpSUwWxXyYZz%-"

# Names with a space in front cannot be written in a template.
_COUNTED, _WEIGHED, _CHARGED, _CONCATENATED, _GENERATED = " counted", " weighed", " charged", " ~", " generation"


class RaisedError(Exception):
    """What a template says with `raise_exception`: it is not made for such messages."""


def compile_template(source: str) -> Callable[..., Rendered]:
    """What renders a template: `render(values, work) -> Rendered`, `work` in nanoseconds (estimated).

    Raises:
        RefusedError: The template is too long, does not compile, or has a statement that is not allowed.
    """
    if len(source) > MAX_SOURCE:
        raise RefusedError(f"it has {len(source)} characters and may have {MAX_SOURCE}")
    environment = _Environment()
    try:
        words = (kind for _, kind, _ in environment.lex(source) if kind != "whitespace")
        if sum(1 for _ in itertools.islice(words, MAX_WORDS + 1)) > MAX_WORDS:
            raise RefusedError(f"it has more than {MAX_WORDS} words and signs")
        tree = environment.parse(source)
        _guard(tree)
        template = environment.from_string(tree)
    except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise RefusedError(_line(error)) from None
    return functools.partial(_render, template)


def _render(template: jinja2.Template, values: Mapping[str, Any], work: int) -> Rendered:
    token = budget.set(Budget(work))
    try:
        context = template.new_context(dict(values))
        text = join(list(template.root_render_func(context)))
    except (RefusedError, TooMuchError, RaisedError):
        raise
    except RecursionError:
        raise TooMuchError from None
    except Exception as error:  # whatever the code of a stranger runs into
        raise RefusedError(_line(error)) from None
    finally:
        budget.reset(token)
    return text if isinstance(text, Rendered) else Rendered(text)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


# --- the tree ---------------------------------------------------------------------------------------------------------

_STATEMENTS: Final = (
    nodes.Template, nodes.Output, nodes.For, nodes.If, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.Assign,
    nodes.AssignBlock, nodes.ExprStmt, nodes.With, nodes.Continue, nodes.Break,
)  # fmt: skip


def _guard(tree: nodes.Template) -> None:
    """Refuse what is not on the list, and put the counting in."""
    body = list(tree.find_all(nodes.Node))
    for node in body:
        if isinstance(node, nodes.Stmt) and not isinstance(node, _STATEMENTS):
            raise RefusedError(f"it has {{% {type(node).__name__.lower()} %}}, which a chat template may not")
        if isinstance(node, nodes.For) and node.recursive:
            raise RefusedError("it has a recursive loop, which a chat template may not")
        if isinstance(node, nodes.Name) and node.name == "self":
            raise RefusedError("it uses 'self', which a chat template may not")
    # From the leaves up, so that a node is still in its place when what is above it is changed.
    for node in [*reversed(body), tree]:
        for field, value in node.iter_fields():
            setattr(node, field, _weighed(value))
    _count(tree)


def _count(node: nodes.Node) -> int:
    """Let loops and macros pay for what is in them; returns what going through the node once costs at most."""
    cost = STEP + sum(map(_count, node.iter_child_nodes()))
    match node:
        case nodes.TemplateData():
            cost += guarded.CHARACTER * len(node.data)
        case nodes.For(iter=nodes.Expr() as values):
            node.iter = _call(_COUNTED, values, nodes.Const(cost))
        case nodes.Macro() | nodes.CallBlock() | nodes.Template():
            node.body.insert(0, nodes.ExprStmt(_call(_CHARGED, nodes.Const(cost))))
    return cost


def _weighed(value: Any) -> Any:
    match value:
        case list():
            return [_weighed(item) for item in value]
        case nodes.Concat():
            return _call(_CONCATENATED, nodes.List(value.nodes))
        case nodes.List() | nodes.Dict():
            return _call(_WEIGHED, value)
        case nodes.Tuple() if value.ctx == "load":
            return _call(_WEIGHED, value)
        case nodes.Compare():
            operands = [nodes.Operand(operand.op, _call(_WEIGHED, operand.expr)) for operand in value.ops]
            return nodes.Compare(_call(_WEIGHED, value.expr), operands)
    return value


def _call(name: str, value: nodes.Expr, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(arguments), [], None, None)


@final
class _Generation(Extension):
    """`{% generation %}`: what stands inside is what the model writes."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """A block whose text goes through a filter that marks it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.FilterBlock(body, nodes.Filter(None, _GENERATED, [], [], None, None)).set_lineno(line)


# --- the environment --------------------------------------------------------------------------------------------------


class _Undefined(jinja2.Undefined, Missing):
    """A name, key or attribute that is not there: empty as text, an error in most uses."""

    __slots__ = ()


@final
class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)
    concat = staticmethod(join)  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            undefined=_Undefined,
            finalize=_finalize,
            optimized=False,
            cache_size=0,
        )
        self.filters = cast(Any, _FILTERS)
        self.tests = cast(Any, _TESTS)
        self.globals = dict(_GLOBALS)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`: a method on the list, else an item."""
        if (found := guarded.method(obj, attribute)) is not None:
            return found
        return self.getitem(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`; never an attribute of Python's."""
        match obj:
            case dict() | str() | list() | tuple() | range():
                return self._item(obj, argument)
            case Namespace() if isinstance(argument, str) and not argument.startswith("_"):
                return getattr(obj, argument, self.undefined(obj=obj, name=argument[:100]))
            case LoopContext() if argument in _LOOP:
                return getattr(obj, argument)
            case LoopContext() if argument == "cycle":
                return Method([], lambda _, *values: obj.cycle(*values))
            case jinja2.Undefined():
                return obj[argument]  # raises, and names the variable
        return self.undefined(obj=obj, name=str(argument)[:100])

    def _item(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, slice):
            charge(ITEM * (1 + len(obj)))
        elif isinstance(argument, str):
            charge(guarded.CHARACTER * len(argument))
        try:
            return obj[argument]
        except (TypeError, LookupError):
            return self.undefined(obj=obj, name=str(argument)[:100])

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """`obj(...)`: methods, macros and the functions of the list."""
        charge(STEP)
        if not isinstance(__obj, Macro):  # what the compiler tells functions that ask for the context
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
        match __obj:
            case jinja2.Undefined():
                return __obj(*args)  # raises, and names the variable
            case Macro():
                return __self._within(lambda: __context.call(__obj, *args, **kwargs))
            case Method() if not kwargs:
                return __obj(*args)
        if any(__obj is allowed for allowed in _GLOBALS.values()):
            return __obj(*args, **kwargs)
        raise RefusedError("it calls what is no method or function of a chat template")

    def _within(self, call: Callable[[], Any]) -> Any:
        purse = budget.get()
        purse.depth += 1
        if purse.depth > _MAX_CALLS:
            raise TooMuchError
        try:
            return call()
        finally:
            purse.depth -= 1

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`."""
        for value in (left, right):
            if isinstance(value, jinja2.Undefined):
                return self.binop_table[operator](left, right)  # raises, and names the variable
        return guarded.operate(operator, left, right)


def _hidden(function: Callable[..., Any]) -> Callable[..., Any]:
    """As a filter or test that Jinja never evaluates while it compiles: there is no budget then."""

    def call(_: Context, *arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    return jinja2.pass_context(call)


@jinja2.pass_context
def _finalize(_: Context, value: Any) -> str:
    return guarded.written(value)


def _weigh(value: Any) -> Any:
    """Pay for a value that is compared, or put into a list; what a template cannot look into costs nothing."""
    if not isinstance(value, Namespace | Macro | LoopContext):
        weigh(value)
    return value


def _counted(values: Any, cost: int) -> list[Any]:
    """What a loop goes through, paid for."""
    try:
        n = len(values)
    except TypeError:
        values = list(values)
        n = len(values)
    charge((cost + ITEM) * n)
    return list(values)


def _generated(text: str) -> Rendered:
    weigh(text)
    return Rendered(text, text.runs if isinstance(text, Rendered) else (), [(0, len(text))])


# --- filters, tests and functions -------------------------------------------------------------------------------------


def _plainly(name: str, *, times: int = 1) -> Callable[..., Any]:
    """Jinja's own filter, where its result is no larger than what it reads and its work a few times that."""
    theirs: Any = filters.FILTERS[name]

    @jinja2.pass_context
    def apply(context: Context, value: Any, *arguments: Any, **options: Any) -> Any:
        for _ in range(times):
            weigh(value)
        weigh(*arguments, *options.values())
        needs = getattr(theirs, "jinja_pass_arg", None)
        first = {None: (), "context": (context,), "eval_context": (context.eval_ctx,)}
        given = first.get(needs and needs.name, (context.environment,))
        result = theirs(*given, value, *arguments, **options)
        if hasattr(result, "__next__"):
            charge(STEP * len(value))
            result = list(result)
        return taint(result, value, *arguments)

    return apply


def _default(value: Any, other: Any = "", boolean: bool = False) -> Any:
    return other if isinstance(value, jinja2.Undefined) or (boolean and not value) else value


def _length(value: Any) -> int:
    return 0 if isinstance(value, jinja2.Undefined) else len(value)


def _items(value: Any) -> list[Any]:
    if isinstance(value, jinja2.Undefined):
        return []
    if (items := guarded.method(value, "items")) is None:
        raise TypeError(f"there are no items in a {type(value).__name__}")
    return items()


_NAMES: Final = (
    "abs", "first", "float", "int", "last", "list", "max", "min", "map", "reject", "rejectattr", "reverse", "select",
    "selectattr",
)  # fmt: skip
_FILTERS: Final[dict[str, Callable[..., Any]]] = {
    **{name: _plainly(name) for name in _NAMES},
    **{name: _plainly(name, times=20) for name in ("dictsort", "sort", "unique")},
    **{name: _hidden(guarded.text_filter(name)) for name in ("capitalize", "lower", "replace", "title", "upper")},
    **{name: _hidden(_default) for name in ("d", "default")},
    **{name: _hidden(_length) for name in ("count", "length")},
    "indent": _hidden(guarded.indented),
    "items": _hidden(_items),
    "join": _hidden(guarded.joined),
    "safe": _hidden(guarded.written),  # nothing is escaped here
    "string": _hidden(guarded.written),
    "tojson": _hidden(guarded.as_json),
    "trim": _hidden(guarded.text_filter("strip")),
    _CHARGED: _hidden(charge),
    _CONCATENATED: _hidden(guarded.concatenated),
    _COUNTED: _hidden(_counted),
    _GENERATED: _hidden(_generated),
    _WEIGHED: _hidden(_weigh),
}


def _weighing(test: Callable[..., bool]) -> Callable[..., Any]:
    def ask(value: Any, *arguments: Any) -> bool:
        for one in (value, *arguments):
            _weigh(one)
        return test(value, *arguments)

    return _hidden(ask)


def _of_integers(test: Callable[..., bool]) -> Callable[..., Any]:
    def ask(*numbers: Any) -> bool:
        return all(type(number) is int for number in numbers) and test(*numbers)

    return _hidden(ask)


_KINDS: Final = (
    "boolean", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number", "sequence", "string",
    "true", "undefined",
)  # fmt: skip
_COMPARING: Final = (
    "!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lower", "lt",
    "ne", "sameas", "upper",
)  # fmt: skip
_TESTS: Final[dict[str, Callable[..., Any]]] = {
    **{name: _hidden(tests.TESTS[name]) for name in _KINDS},
    **{name: _of_integers(tests.TESTS[name]) for name in ("divisibleby", "even", "odd")},
    **{name: _weighing(tests.TESTS[name]) for name in _COMPARING},
}


def _raise(message: Any) -> None:
    raise RaisedError(str(message)[:300])


def _now(form: str) -> str:
    """The date; a width in a directive (`%999d`) would make it as long as that."""
    directives = [piece[:1] for piece in form.replace("%%", "").split("%")[1:]]
    if len(form) > 100 or not all(directive and directive in _DIRECTIVE for directive in directives):
        raise RefusedError("it asks for the date in a form that a chat template may not")
    return datetime.now().strftime(form)


def _range(*limits: int) -> range:
    found = range(*limits)
    if len(found) > _MAX_RANGE:
        raise TooMuchError
    return found


def _dict(*pairs: Any, **items: Any) -> dict[Any, Any]:
    weigh(*pairs, *items.values())
    return dict(*pairs, **items)


def _namespace(*pairs: Any, **items: Any) -> Namespace:
    return Namespace(_dict(*pairs) if pairs else {}, **items)


_GLOBALS: Final[dict[str, Any]] = {
    "dict": _dict,
    "namespace": _namespace,
    "raise_exception": _raise,
    "range": _range,
    "strftime_now": _now,
}
