"""Dates in many languages and formats, and what they are in ISO 8601: made, not collected."""

import datetime
import random
from collections.abc import Iterator
from typing import Final, final

from qkv.config import config
from qkv.data.pairs import PairSourceConfig, TextPair
from qkv.errors import ConfigError, FileError

LOCALES: Final = (
    "cs", "da", "de", "el", "en", "en_GB", "es", "et", "fi", "fr", "hu", "id", "it", "nb", "nl", "pl", "pt", "ro",
    "ru", "sk", "sl", "sv", "tr", "uk",
)  # fmt: skip


@final
@config
class DatesConfig(PairSourceConfig):
    """Pairs such as `4. März 2021` and `2021-03-04`, no source twice.

    The formats are Babel's medium, long and full ones in each locale, where they write the month as a word and the year
    in full: those name one date, whoever reads them. (Croatian is not among the locales: its October is the Polish
    November.)

    Attributes:
        n: How many.
        seed: Of the random dates and formats.
        locales: Babel's names of languages and countries.
        years: The first and the last.
    """

    n: int = 20_000
    seed: int = 0
    locales: tuple[str, ...] = LOCALES
    years: tuple[int, int] = (1950, 2049)

    def __post_init__(self) -> None:
        first, last = self.years
        if not (self.n >= 1 and self.locales and 1000 <= first <= last <= 9999):
            raise ConfigError(
                f"n={self.n} must be at least 1, years={[first, last]} rise, from 1000 to 9999 at most, and locales "
                "name at least one"
            )

    def pairs(self) -> Iterator[TextPair]:
        formats = _formats(self.locales)
        draw = random.Random(self.seed)
        begin, end = datetime.date(self.years[0], 1, 1), datetime.date(self.years[1], 12, 31)
        days = (end - begin).days + 1
        if self.n > days * len(formats) // 2:
            raise ConfigError(f"n={self.n} is more than half of the {days * len(formats)} texts there are; lower it")
        seen: set[str] = set()
        while len(seen) < self.n:
            date = begin + datetime.timedelta(days=draw.randrange(days))
            pattern, locale = draw.choice(formats)
            text = " ".join(pattern.apply(date, locale).split())
            if text not in seen:
                seen.add(text)
                yield text, date.isoformat()


def _formats(locales: tuple[str, ...]) -> list:
    """(pattern, locale) of all formats that name one date."""
    try:
        from babel import Locale, UnknownLocaleError
    except ImportError:
        raise FileError('the dates need Babel; pip install "qkv[dates]"') from None
    found = []
    for name in locales:
        try:
            locale = Locale.parse(name)
        except (UnknownLocaleError, ValueError):
            raise ConfigError(f"locales: Babel knows no {name!r}; leave it out") from None
        for length in ("medium", "long", "full"):
            pattern = locale.date_formats[length]
            if ("MMM" in pattern.pattern or "LLL" in pattern.pattern) and pattern.pattern.count("y") != 2:
                found.append((pattern, locale))
    if not found:
        raise ConfigError(f"no format of the locales {', '.join(locales)} writes the month as a word; name another")
    return found
