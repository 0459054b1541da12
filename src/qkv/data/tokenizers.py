"""Tokenizers: text to ids and back, exactly.

One class wraps the `tokenizers` library; the configs say how to get one.
"""

import contextlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, final

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from qkv.config import Config, config
from qkv.errors import ConfigError, FileError
from qkv.fetch import write_atomic

END_OF_TEXT: Final = "<|endoftext|>"
MAX_FILE_BYTES: Final = 1 << 28
MAX_VOCAB_SIZE: Final = 1 << 20

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
_CHARACTERS = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")

# Both always split before a line end that a word follows. After it would be wrong: in "\n\nword" they split between the
# line ends, but at the end of a text they do not.
_PIECE = re.compile(r".{65536,}?(?=\n\w)|.+", re.DOTALL)


@final
class Tokenizer:
    """Text to token ids and back.

    `decode(encode(text)) == text` for the tokenizers made here. Text is only ever text: a special token's name, such as
    `<|endoftext|>`, is encoded like any other word when it stands in a document.

    Attributes:
        end_of_text: The id that separates documents, or None.
        vocab_size: Number of ids, one more than the largest.
    """

    end_of_text: int | None
    vocab_size: int

    def __init__(self, inner: tokenizers.Tokenizer, *, end_of_text: int | None = None) -> None:
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._cuttable = _is_cuttable(inner)
        self._vocabulary = inner.get_vocab()
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        self.end_of_text = self._vocabulary.get(END_OF_TEXT) if end_of_text is None else end_of_text
        if self.end_of_text not in (None, *self._vocabulary.values()):
            raise ConfigError(f"end_of_text={end_of_text} is not an id of this tokenizer, which has {self.vocab_size}")

    @classmethod
    def load(cls, path: Path, *, end_of_text: int | None = None) -> "Tokenizer":
        """Read a tokenizer.json, of ours or anyone's.

        Args:
            path: The file, or a folder that has a `tokenizer.json`.
            end_of_text: The id that separates documents. Where not given, it is the `eos_token` that a
                `tokenizer_config.json` in the same folder names, else `<|endoftext|>`, else None.

        Raises:
            FileError: The file is missing or damaged.
            ConfigError: `end_of_text` is not an id of this tokenizer.
        """
        path = path / "tokenizer.json" if path.is_dir() else path
        data = _read(path)
        with _no_panic(f"{path}: not a tokenizer.json that can be read"):
            inner = tokenizers.Tokenizer.from_buffer(data)
            largest = max(inner.get_vocab().values(), default=-1)
        if not 0 <= largest < len(data):
            raise FileError(f"{path}: the largest id is {largest}, impossible in {len(data)} bytes; get the file again")
        return cls(inner, end_of_text=_end_of_text(path, inner) if end_of_text is None else end_of_text)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, and `tokenizer_config.json` for `end_of_text`, into an existing folder.

        Each is written whole or not at all. transformers reads them, too.

        Raises:
            FileError: They cannot be written.
        """
        named = {} if self.end_of_text is None else {"eos_token": self._inner.id_to_token(self.end_of_text)}
        settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | named, indent=2)
        try:
            write_atomic(folder / "tokenizer_config.json", settings.encode("utf-8"))
            write_atomic(folder / "tokenizer.json", self.to_json().encode("utf-8"))
        except OSError as error:
            raise FileError(
                f"{folder}: the tokenizer cannot be written ({error.strerror}); choose another folder"
            ) from None

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return self._inner.to_str(pretty=True)

    def identity(self) -> str:
        """Equal for tokenizers that are the same."""
        return json.dumps([self.end_of_text, self.to_json()])

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens.

        Raises:
            ConfigError: A character that the tokenizer does not know, or half a surrogate pair.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores. See `encode`."""
        pieces = [list(self._pieces(text)) for text in texts]
        try:
            with _no_panic("the tokenizer failed on this text"):
                encoded = self._inner.encode_batch_fast([p for text in pieces for p in text], add_special_tokens=False)
        except FileError as error:
            raise self._unknown(texts) or error from None
        ids = (encoding.ids for encoding in encoded)
        return [list(itertools.chain.from_iterable(itertools.islice(ids, len(text)))) for text in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens have none. Bytes that are not UTF-8 become U+FFFD."""
        with _no_panic("the tokenizer failed on these ids"):
            return self._inner.decode(ids, skip_special_tokens=True)

    def stream(self) -> "TextStream":
        """A decoder for ids that come one at a time."""
        return TextStream(self)

    def _pieces(self, text: str) -> Iterator[str]:
        """Parts whose ids, one after the other, are the ids of the text. They bound memory and share out the work."""
        return (match[0] for match in _PIECE.finditer(text)) if self._cuttable else iter([text])

    def _unknown(self, texts: Sequence[str]) -> ConfigError | None:
        for text in texts:
            for character in text:
                if "\ud800" <= character <= "\udfff":
                    return ConfigError(f"{character!r} is half a surrogate pair, which is no character; remove it")
                if character not in self._vocabulary and isinstance(self._inner.model, models.WordLevel):
                    return ConfigError(
                        f"the character {character!r} is not in the corpus that this tokenizer was made from; "
                        "leave it out, or train with a BPE tokenizer"
                    )
        return None


@final
class TextStream:
    """Text from ids that come one at a time, never half a character.

    All it returns, one after the other, is what `decode` makes of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that is certain now; often empty while a character is incomplete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        new = self._advance(text.rstrip("\ufffd"))
        if new and not text.endswith("\ufffd"):
            # One token stays: some tokenizers write a word at the beginning without its space.
            self._ids = [token]
            self._shown = len(self._tokenizer.decode(self._ids))
        return new

    def flush(self) -> str:
        """The rest, at the end."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        new = text[self._shown :]
        self._shown += len(new)
        return new


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

    @abstractmethod
    def identity(self) -> str:
        """What, besides the documents, decides which tokenizer `train` returns."""


@final
@config
class CharacterTokenizerConfig(TokenizerConfig):
    """Every character of the corpus is a token.

    The characters of held-out text count as well: they are few, and without them that text could not be encoded.
    """

    reads_validation: ClassVar[bool] = True

    def train(self, documents: Iterable[str]) -> Tokenizer:
        """See `TokenizerConfig.train`."""
        characters = sorted(set[str]().union(*documents))
        vocabulary = {token: i for i, token in enumerate([END_OF_TEXT, *characters])}
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary))
        inner.pre_tokenizer = _CHARACTERS
        inner.decoder = decoders.Fuse()
        inner.add_special_tokens([END_OF_TEXT])
        return Tokenizer(inner)

    def identity(self) -> str:
        """See `TokenizerConfig.identity`."""
        return json.dumps(self.to_dict())


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
        """See `TokenizerConfig.train`."""
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = _BYTES
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator((match[0] for text in documents for match in _PIECE.finditer(text)), trainer)
        return Tokenizer(inner)

    def identity(self) -> str:
        """See `TokenizerConfig.identity`."""
        return json.dumps([self.to_dict(), tokenizers.__version__])


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
        """See `TokenizerConfig.train`; reads the file and no document."""
        return Tokenizer.load(Path(self.path).expanduser(), end_of_text=self.end_of_text)

    def identity(self) -> str:
        """See `TokenizerConfig.identity`."""
        return self.train(()).identity()


def _is_cuttable(inner: tokenizers.Tokenizer) -> bool:
    """Whether the ids of a text are those of its pieces (`_PIECE`): it splits as our own tokenizers do."""
    known = {str(_BYTES), str(_CHARACTERS)}
    only_special = all(token.special for token in inner.get_added_tokens_decoder().values())
    return str(inner.pre_tokenizer) in known and inner.normalizer is None and only_special


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); give a tokenizer.json") from None
    if len(data) > MAX_FILE_BYTES:
        raise FileError(f"{path}: more than {MAX_FILE_BYTES} bytes, so not a tokenizer.json; give one")
    return data


def _end_of_text(path: Path, inner: tokenizers.Tokenizer) -> int | None:
    """The id of the `eos_token` that the settings beside a tokenizer.json name."""
    settings = path.with_name("tokenizer_config.json")
    if not settings.is_file():
        return None
    try:
        named: Any = json.loads(_read(settings))
        token: Any = named.get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
    except (ValueError, RecursionError, AttributeError):
        raise FileError(f"{settings}: not a JSON object; get the tokenizer again") from None
    return inner.token_to_id(text) if isinstance(text, str) else None


@contextlib.contextmanager
def _no_panic(what: str) -> Iterator[None]:
    """Turn what the library raises, also its `PanicException` that is no `Exception`, into a `FileError`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FileError(f"{what} ({reason}); get the tokenizer again") from None
