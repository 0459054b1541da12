# pyright: reportUnknownMemberType=false
"""Configs: frozen plain data, and the link to the class that each of them builds.

A config is keyword-only and strict, and it makes the round trip through JSON and YAML. In those it is a mapping whose
`type` is the class name without the ending `Config`. It may be left out where the field admits a single class, or
names a concrete one first.
"""

import dataclasses
import functools
import inspect
import numbers
import re
import types
import typing
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, TypeVar, dataclass_transform

import pydantic
import pydantic.dataclasses

from qkv.errors import ConfigError, suggest

T = TypeVar("T", bound="Config")
Call = TypeVar("Call", bound=Callable[..., Any])


class Config:
    """Base of every config. Subclasses are decorated with `@config`; those that list `ABC` are abstract.

    Two configs with the same content are equal and hash alike.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError(_undecorated(type(self)))

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
        own = typing.cast("type[Any]", type(self))
        if own is not made and "__init__" not in vars(own):
            raise TypeError(_undecorated(own))
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


def _undecorated(cls: type) -> str:
    return f"{cls.__name__} is no config yet: its fields are not read; write @config above the class"


def checked(call: Call) -> Call:
    """A function whose arguments are checked where it is called, by their hints, and not by what fails deep inside.

    Raises (from the decorated function):
        ConfigError: An argument is of another kind.
    """
    signature = inspect.signature(call)

    @functools.cache
    def kinds() -> dict[str, Any]:
        hints, found = typing.get_type_hints(call), dict[str, Any]()
        for name in signature.parameters.keys() & hints.keys():
            try:
                found[name] = pydantic.TypeAdapter(hints[name])
            except pydantic.errors.PydanticUserError:  # a tensor, a class of ours
                continue
        return found

    @functools.wraps(call)
    def checking(*args: Any, **named: Any) -> Any:
        for name, value in signature.bind(*args, **named).arguments.items():
            if name in kinds():
                try:
                    theirs = not isinstance(value, int) and isinstance(value, numbers.Integral)  # NumPy's
                    kinds()[name].validate_python(int(value) if theirs else value, strict=True)
                except pydantic.ValidationError as error:
                    says = error.errors()[0]["msg"]
                    raise ConfigError(f"{name}={value!r}: {says[:1].lower()}{says[1:]}") from None
        return call(*args, **named)

    return typing.cast("Call", checking)


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
    if isinstance(value, str) and not _admits_text(hint) and (classes := list(_config_classes(hint))):
        known = _class_of(value, classes, path).tag()
        raise ConfigError(f"{path}: is the text {value!r} and must be a mapping; write {{type: {known}}}")
    return value


def _admits_text(hint: Any) -> bool:
    return hint is str or typing.get_origin(hint) is typing.Literal or any(map(_admits_text, typing.get_args(hint)))


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
