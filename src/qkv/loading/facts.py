"""What is known of a model of texts or pictures besides its weights."""

from pathlib import Path
from typing import Final, Literal, final

from qkv.config import Config, Count, config
from qkv.data import Tokenizer
from qkv.data.pictures import PicturesConfig
from qkv.disk import write_whole, writing
from qkv.errors import ConfigError, FileError
from qkv.generation import SamplingConfig
from qkv.nn.pooling import PoolName
from qkv.yaml_files import dump_yaml, read_yaml

_FILE: Final = "facts.yaml"


@final
@config
class Facts(Config):
    """What is known of a model of text besides its weights and its tokenizer: read once, and carried along.

    Attributes:
        begin_id: The token that a text begins with, of a model of pairs a target; None: the tokenizer's `end_of_text`.
        begins: Whether every prompt begins with it, as the model is used to; else only an empty one.
        stop_ids: Tokens that end a text.
        pad_id: The token that other libraries fill short rows with.
        pad_side: On which side they do so.
        fill: Tokens up to which each text is filled with `pad_id`, which the model reads like others (SigLIP); None:
            texts stay as they are.
        pool: How its makers make one vector of a text's; None: they do not say.
        unit: Whether they scale that vector to length 1.
        labels: The names of its classes.
        scale: Mean and standard deviation of what its numbers stand for, by which they are to be put back: number x
            deviation + mean; None: they stand for themselves.
        pictures: How its pictures become numbers; None: it reads none.
        sampling: How its makers draw tokens, which exports say; None: they do not say.
        longest: Tokens of what a model of pairs reads, at most; None: any.
        longest_target: Tokens of what it writes, its end included; None: as of what it reads.
    """

    begin_id: int | None = None
    begins: bool = False
    stop_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    pad_side: Literal["left", "right"] | None = None
    fill: Count | None = None
    pool: PoolName | None = None
    unit: bool = False
    labels: tuple[str, ...] = ()
    scale: tuple[float, float] | None = None
    pictures: PicturesConfig | None = None
    sampling: SamplingConfig | None = None
    longest: int | None = None
    longest_target: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> "Facts":
        """Those of a model that qkv trained from scratch: its texts end with the token that ends a document."""
        end = None if tokenizer is None else tokenizer.end_of_text
        return cls() if end is None else cls(stop_ids=(end,))

    @classmethod
    def of_pairs(cls, target: Tokenizer, longest: int | None) -> "Facts":
        """Those of a model of pairs that qkv trained: a target begins and ends with the token that ends a document."""
        end = target.end_of_text
        return cls(begin_id=end, stop_ids=() if end is None else (end,), longest=longest)

    @classmethod
    def load(cls, folder: Path) -> "Facts | None":
        """Those that `save` wrote into a folder; None: it has none. Raises `FileError` where the file is damaged."""
        if not (folder / _FILE).is_file():
            return None
        try:
            return cls.from_dict(read_yaml(folder / _FILE))
        except ConfigError as error:
            raise FileError(f"{folder / _FILE}: not the facts of a model: {error}") from None

    def save(self, folder: Path) -> None:
        """Write them into the folder of a run. Raises `FileError` where that cannot be done."""
        with writing(folder / _FILE):
            write_whole(folder / _FILE, [dump_yaml(self.to_dict()).encode()])
