"""`qkv translate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qkv.cli import STANDARD_INPUT
from qkv.cli.generate import read_lines
from qkv.cli.opening import Whole, json_line
from qkv.errors import ConfigError

if TYPE_CHECKING:
    from qkv.loading.translator import Translation


def translate(
    model: Path,
    text: str = "",
    /,
    *,
    file: Annotated[Path | None, Parameter(("--file", "-f"))] = None,
    beams: Whole = 1,
    n_best: Whole = 1,
    length_penalty: float = 1.0,
    max_new_tokens: Whole = 200,
    scores: bool = False,
    as_json: Annotated[bool, Parameter("--json")] = False,
    batch_size: Whole = 64,
) -> None:
    """Translate with a model that was trained on pairs.

    Args:
        model: A run folder, or a model of the package transly.
        text: What to translate. A single dash: each line of standard input.
        file: A text file; each line is a text. A blank line gives a blank line.
        beams: How many unfinished texts the search keeps.
        n_best: How many translations to print of each text, best first; at most as many as beams.
        length_penalty: 0 prefers the likeliest text, 1 the likeliest per token; more favours longer ones.
        max_new_tokens: How many tokens a translation has at most.
        scores: Print the score before each translation, and a tab.
        as_json: Print one JSON object in a line for each translation.
        batch_size: How many texts are read side by side.
    """
    from qkv.generation import BeamConfig
    from qkv.loading.layouts import load_as
    from qkv.loading.translator import Translator

    search = BeamConfig(beams=beams, length_penalty=length_penalty, max_new_tokens=max_new_tokens)
    if not 1 <= n_best <= beams:
        raise ConfigError(f"--n-best {n_best} must be from 1 to --beams {beams}")
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size} must be at least 1")
    if scores and as_json:
        raise ConfigError("--json says the scores already; leave --scores out")
    texts = _texts(text, file)
    translator = load_as(Translator, model)
    translator.encode(texts)  # what cannot be read is said before anything is written
    for at in range(0, len(texts), 16 * batch_size):
        some = texts[at : at + 16 * batch_size]
        found = translator.translations(some, search=search, batch_size=batch_size)
        for source, best in zip(some, found, strict=True):
            for translation in best[:n_best]:
                print(_line(source, translation, scores, as_json), flush=True)


def _texts(text: str, file: Path | None) -> list[str]:
    if file is None and text != STANDARD_INPUT:
        if not text.strip():
            raise ConfigError("there is nothing to translate; give a TEXT, a --file, or - for standard input")
        return [text]
    if file is not None and text:
        raise ConfigError("there is a text and a --file of them; give one of the two")
    return read_lines(file)


def _line(source: str, found: "Translation", scores: bool, as_json: bool) -> str:
    if as_json:
        facts = {"source": source, "text": found.text, "score": found.score, "log_probability": found.log_probability}
        return json_line(facts | {"ended": found.ended})
    return f"{found.score:.4f}\t{found.text}" if scores else found.text
