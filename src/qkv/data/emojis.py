"""Emojis with their names, as two companies draw them."""

import io
import json
from collections.abc import Iterator
from typing import Final, Literal, final

from qkv.config import config
from qkv.data.described import Described, DescribedSourceConfig
from qkv.data.pictures import Size, read_picture
from qkv.fetch import fetch, read_archive

Vendor = Literal["google", "twitter"]
_PICTURES: Final[dict[Vendor, str]] = {
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
}
_WORDS: Final = "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"


@final
@config
class EmojisConfig(DescribedSourceConfig):
    """Emojis as one company draws them, each with its English name and with words for what it is used for.

    Of people, whose skins may be of five tones, the drawing without one. From the npm packages `emojibase-data` (MIT),
    17.0.0, and `emoji-datasource-google` (Apache-2.0) or `emoji-datasource-twitter` (CC BY 4.0), 16.0.0.

    Attributes:
        vendor: Whose drawings.
        size: Height and width that each is resized to, from 64 x 64.
    """

    vendor: Vendor = "google"
    size: Size = (32, 32)

    def items(self) -> Iterator[Described]:
        from PIL import Image

        words = fetch("emojibase-data", "17.0.0", _WORDS, registry="npm")
        package = fetch(f"emoji-datasource-{self.vendor}", "16.0.0", _PICTURES[self.vendor], registry="npm")
        pattern = f"package/img/{self.vendor}/64/*.png"
        pictures = {_code(name.rpartition("/")[2][:-4]): data for name, data in read_archive(package, pattern)}
        ((_, data),) = read_archive(words, "package/en/data.json")
        for emoji in json.loads(data):
            if (drawn := pictures.get(_code(emoji["hexcode"]))) is not None:
                picture = read_picture(Image.open(io.BytesIO(drawn)), channels=3, size=self.size)
                yield Described(picture, (emoji["label"], *emoji.get("tags", ())))


def _code(name: str) -> str:
    """The characters of an emoji in hexadecimal, without those that only ask for colour."""
    return name.upper().replace("-FE0F", "")
