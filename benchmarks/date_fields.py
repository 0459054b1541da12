"""Where year, month and day stand in a date, and on which of them a model's attention lies."""

import re
from typing import Final, Literal

from qkv.shapes import Float, Tensor

Field = Literal["year", "month", "day"]

_DIGITS: Final[dict[Field, slice]] = {"year": slice(0, 4), "month": slice(5, 7), "day": slice(8, 10)}
_ARTICLES: Final = ("de", "den")  # between day and month, in Spanish, Portuguese and Danish


def fields_of(source: str, target: str) -> dict[Field, slice]:
    """Where year, month and day stand in a date that `DatesConfig` made, in characters.

    Args:
        source: Such as `4. März 2021`. Of its words the month is the one beside the day.
        target: The same in ISO 8601.
    """
    year, _, day = target.split("-")
    numbers = {int(found[0]): found for found in re.finditer(r"\d+", source)}
    y, d = numbers[int(year)], numbers[int(day)]
    # Between day and year, or between year and day, or in front of the day (March 4, 2021).
    words = [word for word in re.finditer(r"[^\W\d_]{2,}", source) if word[0] not in _ARTICLES]
    inner = [w for w in words if min(d.end(), y.end()) <= w.start() and w.end() <= max(d.start(), y.start())]
    month = inner[0] if inner else [word for word in words if word.end() <= d.start()][-1]
    return {"year": slice(*y.span()), "month": slice(*month.span()), "day": slice(*d.span())}


def fields_looked_at(weights: Float[Tensor, "T S"], source: str, target: str) -> dict[Field, Field]:
    """For each field of the output the field of the input on which most of its digits' attention lies.

    Args:
        weights: Of a model whose tokens are characters: of each digit of `target` over the characters of `source`.
        source: As in `fields_of`.
        target: Likewise.
    """
    places = fields_of(source, target)

    def most(digits: slice) -> Field:
        mass: dict[Field, float] = {field: weights[digits, place].sum().item() for field, place in places.items()}
        return max(mass, key=mass.__getitem__)

    return {field: most(digits) for field, digits in _DIGITS.items()}
