"""`qkv forecast`."""

from pathlib import Path

from qkv.cli.opening import Whole, open_model
from qkv.errors import ConfigError


def forecast(model: str, values: Path, /, *, steps: Whole, out: Path) -> None:
    """Continue series of vectors with a model that was trained on some.

    Args:
        model: A run whose data are vectors.
        values: A .npy file of one series (T, features) or of several (N, T, features), scaled as the data were.
        steps: How many vectors to add to each. The series and they must fit the context of the model.
        out: The .npy file to write them to, as (steps, features) or (N, steps, features).
    """
    import io

    import numpy as np

    from qkv.data.sources import open_vectors
    from qkv.disk import write_whole, writing
    from qkv.yaml_files import expand_home

    if out.suffix != ".npy":
        raise ConfigError(f"--out {out} must end in .npy, NumPy's format")
    if out.exists() and values.exists() and out.samefile(values):
        raise ConfigError(f"--out {out} is the file that is read; give another")
    found = open_model(model).forecast(open_vectors(expand_home(values)), steps=steps)
    file = io.BytesIO()
    np.save(file, found.float().cpu().numpy())
    with writing(expand_home(out)):
        write_whole(expand_home(out), [file.getvalue()])
    print(f"the next {steps} of {values} are in {out}")
