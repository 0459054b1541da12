"""What the verbs that let a model write have in common: how it is opened, and how its tokens are drawn."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, final

from cyclopts import Parameter, Token

if TYPE_CHECKING:
    from qkv.loading.loaded import HowToWrite, Loaded


def _whole(kind: object, tokens: Sequence[Token]) -> int:
    """A whole number; cyclopts would round another one."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is no whole number; give one, such as 4") from None


Whole = Annotated[int, Parameter(converter=_whole)]
DType = Literal["float32", "bfloat16"]
Width = Literal["int8", "int4", "w8a8"]


@final
@Parameter(name="*")
@dataclass(frozen=True)
class SamplingOptions:
    """The options of sampling. Those that are not given are as the makers of the model say, if they do.

    Attributes:
        temperature: Below 1 the likely tokens become likelier; 0 always takes the likeliest. By default as the makers
            of the model say, else 0.8.
        top_k: Draw from the k likeliest tokens only.
        top_p: Draw from the likeliest tokens that together have this probability.
        min_p: Draw from the tokens with at least this share of the likeliest one's probability.
        repetition_penalty: Above 1, tokens that have occurred become less likely.
        seed: Of the random numbers: the same seed and the same texts give the same answers.
    """

    temperature: float | None = None
    top_k: Whole | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: Whole | None = None

    def given(self) -> "HowToWrite":
        """Those that are given, as the library calls them.

        Raises:
            ConfigError: A number is out of its range.
        """
        from qkv.generation import SamplingConfig

        given = {name: value for name, value in asdict(self).items() if value is not None}
        SamplingConfig(**given)
        return cast("HowToWrite", given)


NOTHING = SamplingOptions()


def json_line(data: Mapping[str, Any]) -> str:
    """The data as a line for standard output, with escapes where that is not Unicode."""
    return json.dumps(data, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf"))


def open_model(source: str, *, expand: DType | None = None, quantize: Width | None = None) -> "Loaded":
    """`qkv.load` with the options of the command line.

    Raises:
        ConfigError: Both options are given.
        FileError: There is no such model.
    """
    import torch

    from qkv.errors import ConfigError
    from qkv.loading.layouts import load_as
    from qkv.loading.loaded import Loaded

    if expand is not None and quantize is not None:
        raise ConfigError(f"--expand {expand} and --quantize {quantize} exclude each other; give one of them")
    return load_as(Loaded, source, dtype=None if expand is None else getattr(torch, expand), quantize=quantize)
