"""Tokenizers: text to ids and back, exactly.

One class wraps the `tokenizers` library; the configs say how to get one.
"""

import bisect
import contextlib
import itertools
import json
import math
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, final

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from qkv.config import Config, config, expand_home
from qkv.data.rendered import Rendered
from qkv.errors import ConfigError, FileError, QkvError
from qkv.fetch import write_atomic

END_OF_TEXT: Final = "<|endoftext|>"
MAX_FILE_BYTES: Final = 1 << 28
MAX_SETTINGS_BYTES: Final = 1 << 22
MAX_VOCAB_SIZE: Final = 1 << 20

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
_CHARACTERS = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
WORDS = pre_tokenizers.WhitespaceSplit()

# Both always split before a line end that a word follows. After it would be wrong: in "\n\nword" they split between the
# line ends, but at the end of a text they do not.
_PIECE = re.compile(r".{65536,}?(?=\n\w)|.+", re.DOTALL)


class Encoded(NamedTuple):
    """Ids with the places that they come from.

    Attributes:
        ids: Of the whole text.
        places: (start, end) in characters of the text, for each id. The bytes of one character share its place.
    """

    ids: list[int]
    places: list[tuple[int, int]]

    def inside(self, spans: Iterable[tuple[int, int]]) -> list[bool]:
        """Which ids stand wholly within one of these stretches of the text; one that reaches out of it does not."""
        spans = sorted(spans)
        starts = [start for start, _ in spans]
        at = [bisect.bisect_right(starts, start) - 1 for start, _ in self.places]
        return [i >= 0 and end <= spans[i][1] for i, (_, end) in zip(at, self.places, strict=True)]


@final
class Tokenizer:
    """Text to token ids and back.

    `decode(encode(text)) == text` for the tokenizers made here. Text is only ever text: a special token's name, such as
    `<|endoftext|>`, is encoded like any other word when it stands in a document. Special tokens come from a chat
    template alone: `encode_rendered`.

    Attributes:
        end_of_text: The id that separates documents, or None.
        begin_of_text: The id that chat templates know as `bos_token`, or None.
        chat_template: The source of the chat template that came with it, or None.
        vocab_size: Number of ids, one more than the largest.
    """

    end_of_text: int | None
    begin_of_text: int | None
    chat_template: str | None
    vocab_size: int

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        end_of_text: int | None = None,
        begin_of_text: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._twins: dict[bool, tokenizers.Tokenizer] = {}
        self._special = _Special(inner)
        self._cuttable = _is_cuttable(inner)
        self._vocabulary = inner.get_vocab()
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        self.end_of_text = self._vocabulary.get(END_OF_TEXT) if end_of_text is None else end_of_text
        self.begin_of_text = begin_of_text
        self.chat_template = chat_template
        for name, value in (("end_of_text", self.end_of_text), ("begin_of_text", begin_of_text)):
            if value not in (None, *self._vocabulary.values()):
                raise ConfigError(f"{name}={value} is not an id of this tokenizer, which has {self.vocab_size}")

    @classmethod
    def load(cls, path: Path, *, end_of_text: int | None = None) -> "Tokenizer":
        """Read a tokenizer.json, of ours or anyone's, and the chat template beside it.

        The template is in a `chat_template.jinja`, else in the `tokenizer_config.json`; of several there, the one named
        `default`. It is not run before it is used.

        Args:
            path: The file, or a folder that has a `tokenizer.json`.
            end_of_text: The id that separates documents. Where not given, it is the `eos_token` that a
                `tokenizer_config.json` in the same folder names, else `<|endoftext|>`, else None.

        Raises:
            FileError: The file is missing or damaged.
            ConfigError: `end_of_text` is not an id of this tokenizer.
        """
        path = path / "tokenizer.json" if path.is_dir() else path
        data = _read(path, MAX_FILE_BYTES)
        with no_panic(f"{path}: not a tokenizer.json that can be read"), quiet():
            inner = tokenizers.Tokenizer.from_buffer(data)
            inner.no_truncation()
            inner.no_padding()
            largest = max(inner.get_vocab().values(), default=-1)
            _check_bounds(inner)
            _try_out(inner)
        if not 0 <= largest < len(data):
            raise FileError(f"{path}: the largest id is {largest}, impossible in {len(data)} bytes; get the file again")
        settings = _settings(path.with_name("tokenizer_config.json"))
        return cls(
            inner,
            end_of_text=settings.id_of("eos_token", inner) if end_of_text is None else end_of_text,
            begin_of_text=settings.id_of("bos_token", inner),
            chat_template=_chat_template(path.with_name("chat_template.jinja"), settings),
        )

    def files(self) -> dict[str, bytes]:
        """What is written of it: `tokenizer.json`, what else is known in `tokenizer_config.json`, the chat template.

        transformers reads them, too.
        """
        ids = {"eos_token": self.end_of_text, "bos_token": self.begin_of_text}
        named = {key: self.name_of(token) for key, token in ids.items() if token is not None}
        settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | named, indent=2)
        texts = {"tokenizer_config.json": settings, "tokenizer.json": self.to_json()}
        if self.chat_template is not None:
            texts["chat_template.jinja"] = self.chat_template
        return {name: text.encode("utf-8") for name, text in texts.items()}

    def save(self, folder: Path) -> None:
        """Write `files` into an existing folder, each whole or not at all.

        Raises:
            FileError: They cannot be written.
        """
        try:
            for name, data in self.files().items():
                write_atomic(folder / name, data)
        except OSError as error:
            raise FileError(
                f"{folder}: the tokenizer cannot be written ({error.strerror}); choose another folder"
            ) from None

    @property
    def prefix(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer's file puts around a text, and `encode` does not."""
        with no_panic("the tokenizer failed on an empty text"), quiet():
            return tuple(self._inner.encode("", add_special_tokens=True).ids)

    @property
    def inner(self) -> tokenizers.Tokenizer:
        """The tokenizer of the library that this one wraps."""
        return self._inner

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return self._inner.to_str(pretty=True)

    def identity(self) -> str:
        """Equal for tokenizers that are the same."""
        return json.dumps([self.end_of_text, self.begin_of_text, self.chat_template, self.to_json()])

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
            with no_panic("the tokenizer failed on this text"):
                encoded = self._inner.encode_batch_fast([p for text in pieces for p in text], add_special_tokens=False)
        except FileError as error:
            raise self._unknown(texts) or error from None
        ids = (encoding.ids for encoding in encoded)
        return [list(itertools.chain.from_iterable(itertools.islice(ids, len(text)))) for text in pieces]

    def encode_rendered(self, text: Rendered) -> Encoded:
        """The ids of what a chat template wrote: special tokens in the template's own text, and only there.

        A special token's name counts where all of its characters are the template's. In a message it is text like any
        other, also where it is only half in it. All that is as in transformers' `apply_chat_template`, but for messages
        with such a name inside: there transformers reads it as the token.

        What a tokenizer has as an added but not a special token (`<think>`, in some) is a word of its vocabulary, and
        is read anywhere, as `encode` does.

        Raises:
            ConfigError: As for `encode`.
        """
        wanted = self._special.find(text.own())
        try:
            whole = self._run(text, special=True)
            if self._special.holds(whole, wanted):
                return whole
            return self._between(text, wanted)
        except FileError as error:
            raise self._unknown([text]) or error from None

    def units(self, texts: Sequence[str]) -> list[list[str]]:
        """Each text in tokens, written out; words and characters also where the vocabulary lacks them.

        Raises:
            ConfigError: As for `encode`, of other tokenizers.
        """
        if isinstance(self._inner.model, models.WordLevel):
            return [text.split() if self._words else list(text) for text in texts]
        return [[self.name_of(token) for token in ids] for ids in self.encode_batch(texts)]

    def special_ids(self, text: str) -> list[int]:
        """The special tokens whose names stand in a text."""
        return [token for _, _, token in self._special.find(text)]

    def name_of(self, token: int) -> str:
        """How an id is written in the vocabulary; empty: there is no such id."""
        return self._inner.id_to_token(token) or ""

    def _between(self, text: Rendered, wanted: Sequence[tuple[int, int, int]]) -> Encoded:
        """The ids where a message holds a name: piece by piece, between the special tokens that are meant."""
        result, at = Encoded([], []), 0
        for start, end, token in [*wanted, (len(text), len(text), -1)]:
            piece = self._run(text[at:start], special=False)
            result.ids.extend(piece.ids)
            result.places.extend((a + at, b + at) for a, b in piece.places)
            if token >= 0:
                result.ids.append(token)
                result.places.append((start, end))
            at = end
        return result

    def _run(self, text: str, *, special: bool) -> Encoded:
        """Ids with their places, from a twin whose places are not trimmed."""
        if special not in self._twins:
            twin = tokenizers.Tokenizer.from_str(self._inner.to_str())
            twin.encode_special_tokens = not special
            twin.post_processor = None
            self._twins[special] = twin
        with no_panic("the tokenizer failed on this text"):
            encoding = self._twins[special].encode(text, add_special_tokens=False)
        return Encoded(encoding.ids, encoding.offsets)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens have none. Bytes that are not UTF-8 become U+FFFD."""
        with no_panic("the tokenizer failed on these ids"):
            return self._inner.decode(ids, skip_special_tokens=True)

    def stream(self) -> "TextStream":
        """A decoder for ids that come one at a time."""
        return TextStream(self)

    def _pieces(self, text: str) -> Iterator[str]:
        """Parts whose ids, one after the other, are the ids of the text. They bound memory and share out the work."""
        return (match[0] for match in _PIECE.finditer(text)) if self._cuttable else iter([text])

    @property
    def _words(self) -> bool:
        """Whether white space parts the tokens."""
        return str(self._inner.pre_tokenizer) == str(WORDS)

    def _unknown(self, texts: Sequence[str]) -> ConfigError | None:
        what = "word" if self._words else "character"
        for text in texts:
            if half := next((c for c in text if "\ud800" <= c <= "\udfff"), None):
                return ConfigError(f"{half!r} is half a surrogate pair, which is no character; remove it")
            for unit in text.split() if self._words else text:
                if unit not in self._vocabulary and isinstance(self._inner.model, models.WordLevel):
                    return ConfigError(
                        f"the {what} {unit!r} is not in the corpus that this tokenizer was made from; "
                        "leave it out, or train with a BPE tokenizer"
                    )
        return None


@final
class _Special:
    """The names of special tokens, found in a text as the library would find them: the longest first."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        tokens = {i: token for i, token in inner.get_added_tokens_decoder().items() if token.special and token.content}
        order = sorted(tokens, key=lambda i: -len(tokens[i].content))
        self._ids = order
        self._known = frozenset(order)
        self._pattern = re.compile("|".join(_pattern(tokens[i]) for i in order)) if order else None

    def find(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of each."""
        found = self._pattern.finditer(text) if self._pattern else ()
        return [(match.start(), match.end(), self._ids[(match.lastindex or 1) - 1]) for match in found]

    def holds(self, encoded: Encoded, wanted: Sequence[tuple[int, int, int]]) -> bool:
        """Whether the special tokens are those, in those places, and no others."""
        pairs = zip(encoded.places, encoded.ids, strict=True)
        return [(start, end, token) for (start, end), token in pairs if token in self._known] == list(wanted)


def _pattern(token: tokenizers.AddedToken) -> str:
    before, after = r"\s*" * token.lstrip, r"\s*" * token.rstrip
    return f"({before}{re.escape(token.content)}{after})"


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
        return unit_tokenizer({token: i for i, token in enumerate([END_OF_TEXT, *characters])}, words=False)

    def identity(self) -> str:
        """See `TokenizerConfig.identity`."""
        return json.dumps(self.to_dict())


@final
@config
class WordTokenizerConfig(TokenizerConfig):
    """Every word of the corpus is a token; words are what white space parts. `decode` puts one space between them.

    For small closed vocabularies, such as phonemes. The words of held-out text count as well.
    """

    reads_validation: ClassVar[bool] = True

    def train(self, documents: Iterable[str]) -> Tokenizer:
        """See `TokenizerConfig.train`."""
        words = sorted({word for text in documents for word in text.split()})
        return unit_tokenizer({token: i for i, token in enumerate([END_OF_TEXT, *words])}, words=True)

    def identity(self) -> str:
        """See `TokenizerConfig.identity`."""
        return json.dumps(self.to_dict())


def unit_tokenizer(vocabulary: Mapping[str, int], *, words: bool, special: Sequence[str] = (END_OF_TEXT,)) -> Tokenizer:
    """A tokenizer whose tokens are characters, or words; the first special token ends a text."""
    inner = tokenizers.Tokenizer(models.WordLevel(dict(vocabulary)))
    inner.pre_tokenizer = WORDS if words else _CHARACTERS
    if not words:
        inner.decoder = decoders.Fuse()
    inner.add_special_tokens(list(special))
    return Tokenizer(inner, end_of_text=vocabulary[special[0]])


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
        return Tokenizer.load(expand_home(self.path), end_of_text=self.end_of_text)

    def identity(self) -> str:
        """See `TokenizerConfig.identity`."""
        return self.train(()).identity()


def _is_cuttable(inner: tokenizers.Tokenizer) -> bool:
    """Whether the ids of a text are those of its pieces (`_PIECE`): it splits as our own tokenizers do."""
    known = {str(_BYTES), str(_CHARACTERS)}
    only_special = all(token.special for token in inner.get_added_tokens_decoder().values())
    return str(inner.pre_tokenizer) in known and inner.normalizer is None and only_special


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size  # Python allocates all that it is asked for, so ask for no more
            data = file.read(size) if size <= most else b""
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror}); give a {path.name}") from None
    if size > most:
        raise FileError(f"{path}: more than {most} bytes, so not a {path.name}; give one")
    return data


class _Settings(NamedTuple):
    """A tokenizer_config.json."""

    path: Path
    data: dict[str, Any]

    def id_of(self, key: str, inner: tokenizers.Tokenizer) -> int | None:
        """The id of the token that it names; None: it names none."""
        token = self.data.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        return inner.token_to_id(text) if isinstance(text, str) else None


def _settings(path: Path) -> _Settings:
    if not path.is_file():
        return _Settings(path, {})
    try:
        data = json.loads(_read(path, MAX_SETTINGS_BYTES))
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise FileError(f"{path}: not a JSON object; get the tokenizer again")
    return _Settings(path, data)


def _chat_template(path: Path, settings: _Settings) -> str | None:
    if path.is_file():
        try:
            return _read(path, MAX_SETTINGS_BYTES).decode("utf-8")
        except UnicodeDecodeError:
            raise FileError(f"{path}: not UTF-8 text; get the file again") from None
    match settings.data.get("chat_template"):
        case None:
            return None
        case str(source):
            return source
        case list(several):
            for one in several:
                match one:
                    case {"name": "default", "template": str(source)}:
                        return source
    raise FileError(f"{settings.path}: 'chat_template' is neither a text nor a list with one named 'default'; mend it")


def _check_bounds(inner: tokenizers.Tokenizer) -> None:
    """Refuse what would take any memory or time: replacements that multiply a text, endless special tokens.

    Raises:
        ValueError: It has some.
    """
    for name, part in (("normalizer", inner.normalizer), ("decoder", inner.decoder)):
        if part is not None and (times := _growth(json.loads(part.__getstate__()))) > _MAX_GROWTH:
            raise ValueError(f"its {name} could make a text {times:.1g} times as long, at most {_MAX_GROWTH}")
    longest = max((len(token.content) for token in inner.get_added_tokens_decoder().values()), default=0)
    if longest > _MAX_ADDED:
        raise ValueError(f"an added token has {longest} characters, at most {_MAX_ADDED}")


def _growth(part: Any) -> float:
    """How many times as long a text may become; what exchanges single characters counts as 1."""
    match part:
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return max(1.0, len(new) / max(1, len(old)))
        case {"type": "Replace", "content": str(new)}:
            return 1.0 + len(new)  # an expression may match between any two characters
        case {"normalizers": list(parts)} | {"decoders": list(parts)}:
            return math.prod(map(_growth, parts))
    return 1.0


_MAX_GROWTH: Final = 1000
_MAX_ADDED: Final = 1000
_TRIAL: Final = "a A1 é\n\u4e00\U0001f600 ."


def _try_out(inner: tokenizers.Tokenizer) -> None:
    """Let a broken one panic now. That it does not know these characters says nothing."""
    with contextlib.suppress(Exception):
        inner.decode(inner.encode(_TRIAL, add_special_tokens=False).ids)


_stderr_in_use = threading.Lock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the library writes to standard error, past Python, when it panics."""
    with _stderr_in_use, contextlib.ExitStack() as stack:
        try:
            kept = os.dup(2)
        except OSError:  # there is none
            yield
            return
        stack.callback(os.close, kept)
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        stack.callback(os.dup2, kept, 2)
        yield


@contextlib.contextmanager
def no_panic(what: str) -> Iterator[None]:
    """Turn what the library raises, also its `PanicException` that is no `Exception`, into a `FileError`."""
    try:
        yield
    except BaseException as error:
        ours = isinstance(error, QkvError)  # says already what is wrong
        if ours or (not isinstance(error, Exception) and type(error).__name__ != "PanicException"):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FileError(f"{what} ({reason}); get the tokenizer again") from None
