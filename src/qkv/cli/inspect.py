"""`qkv inspect`."""

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from qkv.cli.opening import Whole

if TYPE_CHECKING:
    from qkv.inspect.attention import Query


def inspect(
    model: str,
    text: str,
    /,
    *,
    translation: str | None = None,
    layer: Whole | None = None,
    head: Whole | None = None,
    query: str | None = None,
    rollout: bool = False,
    out: Annotated[Path | None, Parameter(("--out", "-o"))] = None,
) -> None:
    """Draw what a model attended to: in a text, in a picture, or in the source of a translation.

    Args:
        model: A run, a Hugging Face folder, a GGUF file, or a name that `qkv pull` knows; with attention.
        text: What is read: a text, or where the model reads pictures the file of one.
        translation: Whose attention to draw, of a model of pairs. By default the model's own.
        layer: Draw one layer of attention, counted from 0. By default all.
        head: Draw one head, counted from 0. By default all and their mean.
        query: From where in a picture: class (its token), mean (of all tokens), or ROW,COLUMN of a patch, counted from
            0. By default the class token, or where there is none the mean.
        rollout: Draw the product of all layers: where information could flow.
        out: The picture. By default alignment.png or attention.png, or the next of that name with a number that is
            free.
    """
    from qkv.loading.layouts import load
    from qkv.yaml_files import expand_home

    choice: dict[str, Any] = {"translation": translation, "layer": layer, "head": head, "query": _query(query)}
    choice["rollout"] = rollout or None
    found = load(model).inspect(text, **{name: value for name, value in choice.items() if value is not None})
    out = _free(found.name) if out is None else expand_home(out)
    found.draw(out)
    print(found.says)
    print(f"the {found.name} is in {out}")


def _query(given: str | None) -> "Query | None":
    from qkv.errors import ConfigError

    if given is None or given == "class" or given == "mean":
        return given
    parts = given.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--query {given} is unknown; give class, mean, or ROW,COLUMN of a patch, such as 3,5")
    return int(parts[0]), int(parts[1])


def _free(stem: str) -> Path:
    names = (Path(f"{stem}-{n}.png" if n > 1 else f"{stem}.png") for n in count(1))
    return next(name for name in names if not name.exists())
