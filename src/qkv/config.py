# pyright: reportUnknownMemberType=false
"""Configs: frozen plain data, and the link to the class that each of them builds.

A config is keyword-only and strict, and it makes the round trip through JSON and YAML. In those it is a mapping whose
`type` is the class name without the ending `Config`. It may be left out where the field admits a single class, or
names a concrete one first.
"""

import dataclasses
import inspect
import re
import types
import typing
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, dataclass_transform

import pydantic
import pydantic.dataclasses
import yaml

from qkv.errors import ConfigError, FileError, suggest

T = TypeVar("T", bound="Config")


class Config:
    """Base of every config. Subclasses are decorated with `@config`; those that list `ABC` are abstract.

    Two configs with the same content are equal and hash alike.
    """

    _registry: ClassVar[dict[str, type["Config"]]] = {}
    _owner: ClassVar[Callable[..., Any] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = Config._registry.setdefault(cls.tag(), cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"{cls.__qualname__}: the tag {cls.tag()!r} already belongs to {known.__module__}; rename one"
            )
        Config._registry[cls.tag()] = cls

    @classmethod
    def tag(cls) -> str:
        """The name of this class in files: `AttentionConfig` is `Attention`."""
        return cls.__name__.removesuffix("Config")

    def describe(self) -> str:
        """In a few words: its name, and the fields that are not as by default."""
        values = {f.name: getattr(self, f.name) for f in _fields(self) if getattr(self, f.name) != f.default}
        said = (f"{name}={value.describe() if isinstance(value, Config) else value}" for name, value in values.items())
        return self.tag() + (f"({', '.join(said)})" if values else "")

    @classmethod
    def is_abstract(cls) -> bool:
        """Whether it is the base of a kind, which nobody makes."""
        return ABC in cls.__bases__ or inspect.isabstract(cls)

    def _build(self, *args: Any) -> Any:
        """What the class declared as `class Owner(Base, config=ThisConfig)` makes of this config."""
        owner, name = type(self)._owner, type(self).__name__
        if owner is None:
            raise TypeError(f"{name} has nothing to build; declare a class with config={name}, or write {name}.build")
        return owner(self, *args)

    def replace(self: T, **changes: Any) -> T:
        """A copy with other values for some fields.

        Raises:
            ConfigError: As when a config is made.
        """
        return type(self)(**{f.name: getattr(self, f.name) for f in _fields(self)} | changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, ready for JSON or YAML. The inverse of `from_dict`."""
        return {"type": self.tag()} | {f.name: _encode(getattr(self, f.name)) for f in _fields(self)}

    @classmethod
    def from_dict(cls: type[T], data: Any, *, path: str = "") -> T:
        """Rebuild a config.

        Args:
            data: A mapping, as `to_dict` returned it or a person wrote it. Fields with a default may be left out.
            path: Where `data` stands in the file; the beginning of every error message.

        Raises:
            ConfigError: An unknown key or type (with the nearest known name), a missing key, a value of a wrong type.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path or cls.tag()}: needs a mapping of keys to values, found {data!r}")
        return typing.cast(T, _decode(dict(typing.cast(Mapping[str, Any], data)), cls, path))


class Configured:
    """Base of what a config builds. The class names its config: `class GLU(Sublayer, config=GLUConfig)`."""

    def __init_subclass__(cls, *, config: type[Config] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if config is None:
            return
        known = config._owner  # pyright: ignore[reportPrivateUsage]
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__qualname__}: {config.__name__} already builds {known.__qualname__}")
        config._owner = cls  # pyright: ignore[reportPrivateUsage]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def config(cls: type[T]) -> type[T]:
    """Turn a `Config` class into a frozen, keyword-only dataclass whose values are checked when it is made.

    A class of one field also takes its value alone, `Window(4)`, and lists stand for tuples.

    Raises (from the decorated constructor):
        ConfigError: An unknown keyword (with the nearest known one), a missing one, or a value of a wrong type.
    """
    settings = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    made = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=settings)(cls)
    validated_init: Callable[..., None] = made.__init__

    def __init__(self: Any, *alone: Any, **values: Any) -> None:  # noqa: N807
        if cls.is_abstract():
            raise TypeError(f"{made.__name__} is abstract; make one of its subclasses")
        if alone:
            names = _names(made)
            if not len(alone) == len(names) == 1:
                form = ", ".join(f"{name}=..." for name in names)
                raise ConfigError(f"{made.__name__} takes its values by name; write {made.__name__}({form})")
            values = {names[0]: alone[0]} | values
        try:
            validated_init(self, **{name: _plain(name, value) for name, value in values.items()})
        except pydantic.ValidationError as error:
            raise ConfigError(_one_line(made, error)) from None

    made.__init__ = __init__
    made.__doc__ = _with_inherited(made)
    return typing.cast("type[T]", made)


_ENTRY = re.compile(r"^ {4}(\w+): .*(?:\n {8}.*)*", re.MULTILINE)


def _with_inherited(cls: type) -> str:
    """Its docstring, and after it what those of its bases say about the fields that it has from them."""
    own = inspect.cleandoc(cls.__doc__ or "")
    said = {found[1]: found[0] for base in reversed(cls.__mro__[1:]) for found in _ENTRY.finditer(base.__doc__ or "")}
    told = {found[1] for found in _ENTRY.finditer(own)}
    more = [said[name] for name in _names(cls) if name in said and name not in told]
    return "\n".join([own, "", "Inherited:", *more] if more else [own])


def _plain(name: str, value: Any) -> Any:
    """Lists as tuples, and no number that is beyond every size."""
    if isinstance(value, list | tuple):
        return tuple(_plain(name, item) for item in typing.cast("list[Any]", value))
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{name} has more than 63 bits, beyond any size; give a smaller number")
    return value


def must(be: str, fits: Callable[[Any], bool]) -> pydantic.AfterValidator:
    """A bound of a field, as in `Count`: what its value must be."""

    def check(value: Any, field: Any) -> Any:
        if not fits(value):
            raise ConfigError(f"{field.field_name}={value} must {be}")
        return value

    return pydantic.AfterValidator(check)


Count = Annotated[int, must("be at least 1 and below 2**31", lambda n: 1 <= n < 2**31)]
Share = Annotated[float, must("be at least 0 and below 1", lambda p: 0 <= p < 1)]
Positive = Annotated[float, must("be above 0", lambda x: x > 0)]


def _one_line(cls: type, error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    owner, value, cause = cls.__name__, first["input"], first.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # raised by a __post_init__ or a bound: it says what it has to say
        return str(cause)
    where = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "unexpected_keyword_argument":
        return f"{owner} has no {where!r}; {suggest(where, _names(cls))}"
    if first["type"] == "missing":
        return f"{owner} needs {where!r}; give it a value"
    if first["type"] == "finite_number":
        return f"{owner}: {where}={value!r} must be a finite number; give another"
    if isinstance(value, type):
        return f"{owner}.{where} is the class {value.__name__}; give an instance: {value.__name__}(...)"
    return f"{owner}.{where} = {value!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _fields(of: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(of)


def _names(cls: type) -> list[str]:
    return [f.name for f in _fields(cls)]


def _encode(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_encode(item) for item in typing.cast("tuple[Any, ...]", value)]
    return value


def _decode(value: Any, hint: Any, path: str) -> Any:
    if isinstance(value, dict):
        data = dict(typing.cast("dict[str, Any]", value))
        cls = _class_of(data.pop("type", None), list(_config_classes(hint)), path)
        hints = typing.get_type_hints(cls)
        for key in data.keys() - set(_names(cls)):
            raise ConfigError(f"{_join(path, key)}: {cls.tag()} has no {key!r}; {suggest(str(key), _names(cls))}")
        values = {key: _decode(item, hints[key], _join(path, key)) for key, item in data.items()}
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}" if path else str(error)) from None
    if isinstance(value, list):
        items = typing.cast("list[Any]", value)
        return tuple(_decode(item, hint, f"{path}[{i}]") for i, item in enumerate(items))
    return value


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _config_classes(hint: Any) -> Iterator[type[Config]]:
    """The config classes that an annotation such as `tuple[BlockConfig | Repeat, ...] | None` admits."""
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and issubclass(hint, Config):
        yield hint
    for part in typing.get_args(hint):
        yield from _config_classes(part)


def _class_of(tag: object, bases: list[type[Config]], path: str) -> type[Config]:
    if not bases:
        raise ConfigError(f"{path}: takes a plain value, found a mapping; write it as `{path}: value`")
    admitted = {
        name: cls
        for name, cls in Config._registry.items()  # pyright: ignore[reportPrivateUsage]
        if issubclass(cls, tuple(bases)) and not cls.is_abstract()
    }
    if tag is None and len(admitted) == 1:
        return next(iter(admitted.values()))
    if tag is None and bases[0].tag() in admitted:  # the first that the field names, where it is no abstract one
        return bases[0]
    where = path or "the top"
    if tag is None:
        raise ConfigError(f"{where}: needs a 'type'; one of {', '.join(sorted(admitted))}")
    if not isinstance(tag, str) or tag not in admitted:
        raise ConfigError(f"{where}: no type {str(tag)!r} fits here; {suggest(str(tag), admitted)}")
    return admitted[tag]


# --- YAML -----------------------------------------------------------------------------------------------------------


_MAX_BYTES = 1 << 18  # of a file; PyYAML reads a quarter of a megabyte in a second
_MAX_DEPTH = 100
_MAX_VALUES = 10_000  # each alias counted as what it stands for


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `1e-3` is a number (YAML 1.1 reads a string), and a key given twice is an error."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # A recursion that Python does not count: unbounded, it ends the process.
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"values more than {_MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return typing.cast("dict[Any, Any]", super().construct_mapping(node, deep))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, *, source: str = "the text") -> Any:
    """Plain data from YAML.

    Raises:
        ConfigError: The text is not YAML, or gives a key twice; the message names `source` and the line.
    """
    try:
        data = yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
        _check_size(data)
        return data
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{source}{line}: not valid YAML: {problem}") from None


def _check_size(data: Any) -> None:
    waiting, n = [data], 0
    while waiting:
        value, n = waiting.pop(), n + 1
        if n > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES} values")
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value


def expand_home(path: str | Path) -> Path:
    """The path, with what `~` or `~name` at its beginning stands for.

    Raises:
        ConfigError: It is no path.
        FileError: There is nobody of that name.
    """
    if not isinstance(path, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"{path!r} is no path; give one as text or as a pathlib.Path")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise FileError(f"{path}: there is no home folder of that name; write the path in full") from None


def read_yaml(path: Path) -> Any:
    """Plain data from a YAML (or JSON) file.

    Raises:
        FileError: The file cannot be read, or is too large.
        ConfigError: It is not YAML.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe could block for ever
            raise FileError(f"{path}: cannot be read (not a regular file); give the path of a YAML file")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise FileError(f"{path}: has more than the {_MAX_BYTES} bytes of any such file; give another YAML file")
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise FileError(f"{path}: cannot be read (not UTF-8 text); give the path of a YAML file") from None
    except (OSError, ValueError) as error:  # the latter: a path with a NUL
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise FileError(f"{path}: cannot be read ({reason}); give the path of a YAML file") from None
    return parse_yaml(text, source=str(path))


def dump_yaml(data: Any) -> str:
    """YAML text of plain data, keys in the order given; short lists of numbers and strings on one line."""
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def assign(data: dict[str, Any], assignment: str) -> None:
    """Set one value inside nested plain data, in place: `assign(recipe, "optimizer.lr=3e-4")`.

    A whole number between dots is a place in a list: `model.blocks.0.n=4`. The value is read as YAML.

    Raises:
        ConfigError: There is no `=`, or the path leads through something that has no parts.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {assignment!r}: write it as key.key=value, for example optimizer.lr=3e-4")
    *parents, last = path.split(".")
    place: Any = data
    for depth, key in enumerate(parents):
        place = _step(place, key, ".".join(parents[:depth]), path, create={})
    _step(place, last, ".".join(parents), path, create=None)
    place[int(last) if isinstance(place, list) else last] = parse_yaml(text, source=f"--set {path}")


def _step(place: Any, key: str, at: str, path: str, *, create: Any) -> Any:
    if isinstance(place, dict):
        return typing.cast("dict[str, Any]", place).setdefault(key, create)
    if isinstance(place, list):
        items = typing.cast("list[Any]", place)
        if key.isdigit() and int(key) < len(items):
            return items[int(key)]
        raise ConfigError(f"--set {path}: {at!r} is a list of {len(items)}; use a number from 0 to {len(items) - 1}")
    raise ConfigError(f"--set {path}: {at!r} is the value {place!r} and has no part {key!r}")
