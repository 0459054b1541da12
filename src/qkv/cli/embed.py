"""`qkv embed`."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from qkv.cli import STANDARD_INPUT
from qkv.cli.generate import read_lines
from qkv.cli.opening import Width, json_line
from qkv.disk import writing
from qkv.errors import ConfigError


def embed(
    model: str,
    /,
    *texts: str,
    file: Annotated[Path | None, Parameter(("--file", "-f"))] = None,
    out: Annotated[Path | None, Parameter(("--out", "-o"))] = None,
    against: list[str] | None = None,
    pool: Literal["own", "mean", "first"] = "own",
    quantize: Width | None = None,
) -> None:
    """Turn texts or pictures into vectors, one for each, or say how alike they are.

    Args:
        model: An encoder or a language model: a folder, or a name that `qkv pull` knows (minilm, dinov2-small).
        texts: What to read: texts, or where the model reads pictures their files; a model of both takes for a file
            what ends like the name of a picture. A single dash: each line of standard input.
        file: A text file; each line is a text, or the path of a picture.
        out: A .npy file for the vectors, (texts, width) in float32. Without it each is printed as a JSON object.
        against: Print the cosine of each text with this one instead: 1 where they say the same. May be given several
            times.
        pool: From the tokens of a text to one vector: as the model's makers do, the mean, or that of the first token.
        quantize: Pack the weights in memory; w8a8 is meant for encoders.
    """
    given = given_texts(texts, file)
    if out is not None and against:
        raise ConfigError("--out writes vectors and --against prints cosines; give one of the two")
    if out is not None and out.suffix != ".npy":
        raise ConfigError(f"--out {out} must end in .npy, NumPy's format")
    from qkv.loading.layouts import load_as
    from qkv.loading.ready import Embeds

    reader = load_as(Embeds, model, quantize=quantize)
    vectors = reader.embed([*given, *(against or ())], pool=pool, unit=True if against else None)
    assert not isinstance(vectors, list)
    if against:
        own, others = vectors[: len(given)], vectors[len(given) :]
        for text, row in zip(given, (own @ others.T).tolist(), strict=True):
            for other, cosine in zip(against, row, strict=True):
                print(f"{cosine:6.3f}  {text}" + (f"  ·  {other}" if len(against) > 1 else ""))
    elif out is None:
        for text, vector in zip(given, vectors.tolist(), strict=True):
            print(json_line({"text": text, "vector": vector}))
    else:
        import numpy as np

        with writing(out):
            np.save(out, vectors.numpy())
        print(f"{len(given):,} vectors of {vectors.shape[1]:,} numbers: {out}", file=sys.stderr)


def given_texts(texts: tuple[str, ...], file: Path | None) -> list[str]:
    """The texts of the command line, of a file, or of standard input, without blank lines.

    Raises:
        ConfigError: There are none, or texts and a file.
        FileError: There is no text, or it cannot be read.
    """
    if file is not None and texts:
        raise ConfigError("there are texts and a --file of them; give one of the two")
    if file is not None or texts == (STANDARD_INPUT,):
        return [line for line in read_lines(file) if line.strip()]
    if not texts:
        raise ConfigError("there is no text; give one or several, or a --file with one in each line")
    return list(texts)
