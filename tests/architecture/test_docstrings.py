"""Every public method is documented where it is introduced; an override needs words of its own only to say more."""

import importlib
import pkgutil
from types import FunctionType

import qkv


def classes():
    for module in pkgutil.walk_packages(qkv.__path__, "qkv."):
        if not module.name.endswith("__main__"):
            found = importlib.import_module(module.name)
            yield from (cls for cls in vars(found).values() if isinstance(cls, type) and cls.__module__ == module.name)


def documented(cls, name):
    """Whether the class, or one of ours above it, says what the method does."""
    ours = (base for base in cls.__mro__ if base.__module__.startswith("qkv."))
    return any(getattr(vars(base)[name], "__doc__", None) for base in ours if name in vars(base))


def is_method(cls, name, value):
    if isinstance(value, FunctionType):
        return value.__qualname__ == f"{cls.__qualname__}.{name}"
    return isinstance(value, property | classmethod | staticmethod)


def test_every_public_method_is_documented_where_it_is_introduced():
    silent = [
        f"{cls.__module__}.{cls.__qualname__}.{name}"
        for cls in classes()
        if not cls.__name__.startswith("_") and not vars(cls).get("_is_protocol")  # the class says it all
        for name, value in vars(cls).items()
        if not name.startswith("_") and is_method(cls, name, value) and not documented(cls, name)
    ]
    assert silent == []
