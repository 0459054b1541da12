"""Ways to get a tokenizer: train one on the corpus, or read a file."""

import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Final, final

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from qkv.config import Config, config
from qkv.data.tokenizer import BYTES, CHARACTERS, END_OF_TEXT, MASK, WORDS, Tokenizer, pieces
from qkv.errors import ConfigError
from qkv.yaml_files import expand_home

MAX_VOCAB_SIZE: Final = 1 << 20
_FIRST, _LAST = "[CLS]", "[SEP]"

_LONG: Final = re.compile(r"(?:(?!\S{257}|\s{257}).)*(?:\S{256}|\s{256})|.+", re.DOTALL)


@config
class TokenizerConfig(Config, ABC):
    """How to get a tokenizer.

    Attributes:
        reads_validation: Whether `train` is given the held-out text as well.
    """

    reads_validation: ClassVar[bool] = False

    @abstractmethod
    def train(self, documents: Iterable[str]) -> Tokenizer:
        """The tokenizer for these documents; the same one for the same documents."""

    def identity(self) -> str:
        """What, besides the documents, decides which tokenizer `train` returns."""
        return json.dumps([self.to_dict(), tokenizers.__version__])


@final
@config
class CharacterTokenizerConfig(TokenizerConfig):
    """Every character of the corpus is a token.

    The characters of held-out text count as well: they are few, and without them that text could not be encoded.
    """

    reads_validation: ClassVar[bool] = True

    def train(self, documents: Iterable[str]) -> Tokenizer:
        characters = sorted(set[str]().union(*documents))
        return unit_tokenizer({token: i for i, token in enumerate([END_OF_TEXT, *characters])}, words=False)


@final
@config
class WordTokenizerConfig(TokenizerConfig):
    """Every word of the corpus is a token; words are separated by white space. `decode` puts one space between them.

    For small closed vocabularies, such as phonemes. The words of held-out text count as well.
    """

    reads_validation: ClassVar[bool] = True

    def train(self, documents: Iterable[str]) -> Tokenizer:
        words = sorted({word for text in documents for word in text.split()})
        return unit_tokenizer({token: i for i, token in enumerate([END_OF_TEXT, *words])}, words=True)


def unit_tokenizer(vocabulary: Mapping[str, int], *, words: bool, special: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
    """A tokenizer whose tokens are characters, or words; the first special token ends a text."""
    inner = tokenizers.Tokenizer(models.WordLevel(dict(vocabulary)))
    inner.pre_tokenizer = WORDS if words else CHARACTERS
    if not words:
        inner.decoder = decoders.Fuse()
    inner.add_special_tokens(list(special))
    return Tokenizer(inner, end_of_text=vocabulary[special[0]])


def with_mask(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer; where it has no mask token, one with `[MASK]`, and with `[CLS]` and `[SEP]` around texts.

    Texts have the same ids as before. Special tokens that stand around texts already stay. Where tokens of words begin
    with the space before the word, the mask takes its place, too.
    """
    if tokenizer.mask is not None:
        return tokenizer
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    spaced = any(len(name) > 1 and name[0] in "\u0120\u2581" for name in inner.get_vocab())
    inner.add_special_tokens([tokenizers.AddedToken(MASK, special=True, normalized=False, lstrip=spaced)])
    if tokenizer.frame == ((), ()):
        inner.add_special_tokens([_FIRST, _LAST])
        named = [(name, inner.token_to_id(name)) for name in (_FIRST, _LAST)]
        inner.post_processor = processors.TemplateProcessing(single=f"{_FIRST} $A {_LAST}", special_tokens=named)
    return Tokenizer(
        inner,
        end_of_text=tokenizer.end_of_text,
        begin_of_text=tokenizer.begin_of_text,
        mask=inner.token_to_id(MASK),
        chat_template=tokenizer.chat_template,
    )


@final
@config
class BPETokenizerConfig(TokenizerConfig):
    """Byte-level byte-pair encoding, trained on the training split, words split as in GPT-2. It encodes any text.

    Attributes:
        vocab_size: Number of tokens, of which 256 are the bytes and one separates documents. A small corpus gives less.

    Paper: Sennrich et al. 2016 (1508.07909); over bytes: Radford et al. 2019, section 2.2.
    """

    vocab_size: int

    def __post_init__(self) -> None:
        if not 257 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size={self.vocab_size} must be at least 257 (256 bytes and {END_OF_TEXT}) "
                f"and at most {MAX_VOCAB_SIZE}"
            )

    def train(self, documents: Iterable[str]) -> Tokenizer:
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = BYTES
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        words = (part for text in documents for piece in pieces(text) for part in _bounded(piece))
        interruptible(lambda: inner.train_from_iterator(words, trainer))
        return Tokenizer(inner)


@final
@config
class TokenizerFileConfig(TokenizerConfig):
    """A tokenizer that exists already.

    Attributes:
        path: A tokenizer.json, or a folder that has one.
        end_of_text: The id that separates documents, where it is not the one of `<|endoftext|>`.
    """

    path: str
    end_of_text: int | None = None

    def train(self, documents: Iterable[str]) -> Tokenizer:
        return Tokenizer.load(expand_home(self.path), end_of_text=self.end_of_text)

    def identity(self) -> str:
        return self.train(()).identity()


def _bounded(text: str) -> list[str]:
    """The text, cut within words of more than 256 characters: the time to learn merges grows with their square."""
    long = max(map(len, text.split()), default=0) > 256 or re.search(r"\s{257}", text)
    return _LONG.findall(text) if long else [text]


def interruptible(work: Callable[[], object]) -> None:
    """Do what the library does without looking for Ctrl-C, so that Ctrl-C is heard meanwhile."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # given to who waits
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if failed:
        raise failed[0]
