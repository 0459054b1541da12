"""`qkv train`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def train(
    recipe: Path,
    /,
    *,
    changes: Annotated[list[str] | None, Parameter("--set")] = None,
    out: Path | None = None,
    resume: bool = False,
) -> int:
    """Train a model as a recipe says.

    Args:
        recipe: A YAML file, one that comes with qkv (dates, digits, fashion, hindi, phonemes, shakespeare), or the
            recipe.yaml of a run, to repeat it.
        changes: A change to the recipe, such as optimizer.lr=3e-4. May be given several times.
        out: The run folder. By default the next free one under runs/.
        resume: Go on with the run in --out from its last checkpoint.
    """
    from qkv.training import train as run

    return run(recipe, sets=changes or [], out=out, resume=resume)
