"""Attention and Transformers, from the formula to a model that you can train, look inside and exchange.

`import qkv` is fast: the public names, listed in `__init__.pyi`, are imported when they are first used.
"""

from functools import cache
from importlib import import_module


@cache
def _homes() -> dict[str, str]:
    """The module of each public name."""
    import ast
    from pathlib import Path

    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("importlib.metadata").version("qkv")
    if name == "__all__":
        return list(_homes())
    if name not in _homes():
        raise AttributeError(f"module 'qkv' has no attribute {name!r}")
    home = _homes()[name]
    value = globals()[name] = import_module(f"qkv.{name}") if home == "qkv" else getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return [*globals(), *_homes()]
