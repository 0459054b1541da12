"""`qkv classify` and `qkv fill`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from qkv.cli.embed import given_texts
from qkv.cli.opening import Whole, Width, json_line
from qkv.errors import ConfigError

if TYPE_CHECKING:
    from qkv.loading.encoder import Guess


def classify(
    model: str,
    /,
    *texts: str,
    file: Annotated[Path | None, Parameter(("--file", "-f"))] = None,
    labels: str | None = None,
    template: str = "{}",
    top: Whole = 5,
    as_json: Annotated[bool, Parameter("--json")] = False,
    quantize: Width | None = None,
) -> None:
    """Say which class each text or picture is of, the likeliest first, or its number, or the class of each word.

    Args:
        model: An encoder with a head of classes or numbers: a run, or a folder; with --labels a model of texts and
            pictures.
        texts: What to read: texts, or where the model reads pictures their files. A single dash: each line of standard
            input.
        file: A text file; each line is a text, or the path of a picture.
        labels: What pictures may show, words of your own with commas between them.
        template: The text that is read for a label, such as "a picture of {}".
        top: How many classes to print of each.
        as_json: Print one JSON object in a line for each.
        quantize: Pack the weights in memory; w8a8 is meant for encoders.
    """
    given = given_texts(texts, file)
    from qkv.loading.encoder import Encoder
    from qkv.loading.layouts import load_as
    from qkv.loading.matcher import Matcher

    if labels is not None:
        words = [word.strip() for word in labels.split(",") if word.strip()]
        found = load_as(Matcher, model, quantize=quantize).classify(given, words, template=template, top=top)
    elif template != "{}":
        raise ConfigError(f"--template {template!r} is for --labels; give both")
    else:
        encoder = load_as(Encoder, model, quantize=quantize)
        if encoder.gives_numbers:
            for text, numbers in zip(given, encoder.predict(given).tolist(), strict=True):
                print(json_line({"text": text, "numbers": numbers}) if as_json else f"{text}\n  {_written(numbers)}")
            return
        if encoder.gives_tags:
            for text, tags in zip(given, encoder.tag(given), strict=True):
                lines = [f"  {tag.probability:6.1%}  {tag.label:<12} {tag.word}" for tag in tags]
                plain = {"text": text, "words": [tag._asdict() for tag in tags]}
                print(json_line(plain) if as_json else "\n".join([text, *lines]))
            return
        found = encoder.classify(given, top=top)
    for text, guesses in zip(given, found, strict=True):
        if as_json:
            print(json_line({"text": text, "classes": dict(guesses)}))
        else:
            _print(text, guesses)


def fill(model: str, text: str, /, *, top: Whole = 5, as_json: Annotated[bool, Parameter("--json")] = False) -> None:
    """Say what may stand where a text is masked.

    Args:
        model: A masked language model: a run, or a folder.
        text: With the mask's name where a token is to be guessed, such as "Paris is the [MASK] of France."
        top: How many tokens to print for each mask.
        as_json: Print one JSON object in a line for each mask.
    """
    from qkv.loading.encoder import Encoder
    from qkv.loading.layouts import load_as

    for number, guesses in enumerate(load_as(Encoder, model).fill(text, top=top), 1):
        if as_json:
            print(json_line({"mask": number, "tokens": dict(guesses)}))
        else:
            _print(f"mask {number}", guesses)


def _written(numbers: "Sequence[float]") -> str:
    return "  ".join(f"{number:.6g}" for number in numbers)


def _print(title: str, guesses: "Sequence[Guess]") -> None:
    print(title)
    for guess in guesses:
        print(f"  {guess.probability:6.1%}  {guess.label}")
