"""What qkv raises when the user can do something about it. Each message names both facts and the remedy."""

import difflib
from collections.abc import Iterable


class QkvError(Exception):
    """Base of every error that qkv raises on purpose. The CLI prints it in one line and exits with `exit_code`."""

    exit_code = 1


class ConfigError(QkvError, ValueError):
    """A wrong value, name or combination: in a config, a recipe, an option or an argument."""

    exit_code = 2


class KindError(ConfigError, AttributeError):
    """A method of another kind of model. It is an `AttributeError` too, so that `hasattr` says no."""


class FileError(QkvError):
    """A file, folder or package that is missing, damaged or not what it should be."""

    exit_code = 3


class TrainingError(QkvError):
    """Training cannot go on, for example because the loss is not finite."""

    exit_code = 1


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them.

    >>> suggest("thta", ["theta", "scaling"])
    "did you mean 'theta'?"
    >>> suggest("x", ["theta", "scaling"])
    'known: scaling, theta'
    """
    known = sorted(known)
    if close := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known) or '(none)'}"
