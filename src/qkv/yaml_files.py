# pyright: reportUnknownMemberType=false
"""YAML of people and strangers, in and out, and the places that their files are in."""

import re
import typing
from pathlib import Path
from typing import Any

import yaml

from qkv.errors import ConfigError, FileError

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
        ConfigError: It is no path, or empty.
        FileError: There is nobody of that name.
    """
    if not isinstance(path, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"{path!r} is no path; give one as text or as a pathlib.Path")
    if path == "":
        raise ConfigError("a path is empty; give one, such as . for the current folder")
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
