"""The tokenizer: text to ids and back, exactly. It wraps one of the `tokenizers` library."""

import bisect
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple, final

import numpy as np
import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from qkv.data.rendered import Rendered
from qkv.data.text_stream import TextStream
from qkv.data.tokenizer_files import no_panic, quiet, read_inner, read_settings
from qkv.disk import write_whole, writing
from qkv.errors import ConfigError, FileError

END_OF_TEXT: Final = "<|endoftext|>"
MASK: Final = "[MASK]"
_MASKS: Final = (MASK, "<mask>")

_CHARACTERS_AT_ONCE: Final = 1 << 22

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
CHARACTERS = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
WORDS = pre_tokenizers.WhitespaceSplit()

# Both BYTES and CHARACTERS always split before a line end that a word follows. Cutting after it would be wrong: in
# "\n\nword" they split between the line ends, but at the end of a text they do not.
_PIECE = re.compile(r".{65536,}?(?=\n\w)|.+", re.DOTALL)


def pieces(text: str) -> Iterator[str]:
    """Parts of a text, cut where tokenizers that split into `BYTES` or `CHARACTERS` always split."""
    return (match[0] for match in _PIECE.finditer(text))


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


class Framed(NamedTuple):
    """A text with special tokens around it.

    Attributes:
        ids: Of the whole.
        types: The kind of each token, such as 0 in the first text and 1 in a second.
    """

    ids: list[int]
    types: list[int]


@final
class Tokenizer:
    """Text to token ids and back.

    `decode(encode(text)) == text` for the tokenizers made here. The name of a special token, such as `<|endoftext|>`,
    is text like any other in a document; special tokens come from a chat template alone (`encode_rendered`).

    Attributes:
        inner: The tokenizer of the library that this one wraps.
        end_of_text: The id that separates documents, or None.
        begin_of_text: The id that chat templates know as `bos_token`, or None.
        mask: The id that stands for a token to be guessed, or None.
        chat_template: The source of the chat template that came with it, or None.
        vocab_size: Number of ids, one more than the largest.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        end_of_text: int | None = None,
        begin_of_text: int | None = None,
        mask: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self._twins: dict[bool, tokenizers.Tokenizer] = {}
        self._special = _Special(inner)
        self._cuttable = _is_cuttable(inner)
        self._vocabulary = inner.get_vocab()
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        self.end_of_text: int | None = self._vocabulary.get(END_OF_TEXT) if end_of_text is None else end_of_text
        self.begin_of_text = begin_of_text
        known = (token for name in _MASKS if (token := self._special.named(name)) is not None)
        self.mask: int | None = next(known, None) if mask is None else mask
        self.chat_template = chat_template
        for name, value in (("end_of_text", self.end_of_text), ("begin_of_text", begin_of_text), ("mask", mask)):
            if value not in (None, *self._vocabulary.values()):
                raise ConfigError(f"{name}={value} is not an id of this tokenizer, which has {self.vocab_size}")

    @classmethod
    def load(cls, path: Path, *, end_of_text: int | None = None) -> "Tokenizer":
        """Read a tokenizer.json, of ours or anyone's, and the settings and chat template beside it.

        Args:
            path: The file, or a folder that has one, or the older files of GPT-2, RoBERTa (`vocab.json`, `merges.txt`)
                or BERT (`vocab.txt`).
            end_of_text: The id that separates documents; None: the `eos_token` of the settings, else `<|endoftext|>`.

        Raises:
            FileError: The file is missing or damaged.
            ConfigError: `end_of_text` is not an id of this tokenizer.
        """
        inner, settings = read_inner(path), read_settings(path if path.is_dir() else path.parent)
        named = {key: inner.token_to_id(name) for key, name in settings.items() if key != "chat_template"}
        return cls(
            inner,
            end_of_text=named.get("eos_token") if end_of_text is None else end_of_text,
            begin_of_text=named.get("bos_token"),
            mask=named.get("mask_token"),
            chat_template=settings.get("chat_template"),
        )

    def files(self) -> dict[str, bytes]:
        """The files that `load` and transformers read, by name."""
        ids = {"eos_token": self.end_of_text, "bos_token": self.begin_of_text, "mask_token": self.mask}
        named = {key: self.name_of(token) for key, token in ids.items() if token is not None}
        settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | named, indent=2)
        texts = {"tokenizer_config.json": settings, "tokenizer.json": self.to_json()}
        if self.chat_template is not None:
            texts["chat_template.jinja"] = self.chat_template
        return {name: text.encode("utf-8") for name, text in texts.items()}

    def save(self, folder: Path) -> None:
        """Write `files` into a folder, each whole or not at all.

        Raises:
            FileError: They cannot be written.
        """
        with writing(folder):
            folder.mkdir(exist_ok=True)
            for name, data in self.files().items():
                write_whole(folder / name, [data])

    @cached_property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens that the tokenizer's file puts before a text and behind it, and `encode` does not."""
        words = (name for name, token in self._vocabulary.items() if token not in self.special)
        text = next(words, "") if isinstance(self.inner.model, models.WordLevel) else "a"
        with no_panic("the tokenizer failed on a short text"), quiet():
            framed = self.inner.encode(text, add_special_tokens=True)
        own = [i for i, added in enumerate(framed.special_tokens_mask) if not added] or [len(framed.ids)]
        return tuple(framed.ids[: own[0]]), tuple(framed.ids[own[-1] + 1 :])

    @property
    def special(self) -> frozenset[int]:
        """The ids of special tokens."""
        return frozenset(self._special.ids)

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return self.inner.to_str(pretty=True)

    def identity(self) -> str:
        """Equal for tokenizers that are the same."""
        return json.dumps([self.end_of_text, self.begin_of_text, self.mask, self.chat_template, self.to_json()])

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens.

        Raises:
            ConfigError: A character that the tokenizer does not know, or half a surrogate pair.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text. See `encode`."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_framed(self, texts: Sequence[str], *, special: bool = False) -> list[Framed]:
        """The ids of each text with the special tokens that the tokenizer's file puts around one, such as `[CLS]`.

        Args:
            texts: Of any lengths.
            special: Whether the name of a special token in a text is that token, such as `[MASK]`.

        Raises:
            ConfigError: As for `encode`.
        """
        inner = self._twin(special=True) if special else self.inner
        try:
            with no_panic("the tokenizer failed on this text"):
                plain = inner.encode_batch(list(texts), add_special_tokens=False)
                framed = [self.inner.post_process(one) for one in plain]
        except FileError as error:
            raise self._unknown(texts) or error from None
        return [Framed(one.ids, one.type_ids) for one in framed]

    def encode_words(self, words: Sequence[str]) -> tuple[Framed, list[int | None]]:
        """The words of a text with a space between them, framed; and for each the place of its first token.

        Of a word that has no token of its own that is None.

        Raises:
            ConfigError: As for `encode`.
        """
        text = " ".join(words)
        try:
            with no_panic("the tokenizer failed on this text"):
                made = self.inner.post_process(self.inner.encode(text, add_special_tokens=False))
        except FileError as error:
            raise self._unknown([text]) or error from None
        firsts, begin, at = list[int | None](), 0, 0
        for word in words:
            end = begin + len(word)
            while at < len(made.ids) and (made.special_tokens_mask[at] or made.offsets[at][1] <= begin):
                at += 1
            firsts.append(at if at < len(made.ids) and made.offsets[at][0] < end else None)
            at += firsts[-1] is not None
            begin = end + 1
        return Framed(made.ids, made.type_ids), firsts

    def encode_arrays(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each text, one after the other, on all cores; no more than some of a long text at once."""
        cut = ((n, piece) for n, text in enumerate(texts) for piece in (self._pieces(text) if text else [""]))
        at, characters = 0, 0
        done: list[np.ndarray] = []

        def group(piece: tuple[int, str]) -> int:
            nonlocal characters
            characters += len(piece[1])
            return characters // _CHARACTERS_AT_ONCE

        for _, group_of_pieces in itertools.groupby(cut, group):
            numbers, some = zip(*group_of_pieces, strict=True)
            try:
                with no_panic("the tokenizer failed on this text"):
                    encoded = self.inner.encode_batch_fast(some, add_special_tokens=False)
            except FileError as error:
                raise self._unknown(some) or error from None
            for n, encoding in zip(numbers, encoded, strict=True):
                if n > at:
                    yield np.concatenate(done)
                    at, done = n, []
                done.append(np.array(encoding.ids, dtype=self.dtype))
        if done:
            yield np.concatenate(done)

    def lost(self, characters: Iterable[str]) -> list[str]:
        """Those of the characters that can be seen, and are left out or become the unknown token."""
        seen = [c for c in characters if c.isprintable() and not c.isspace()]
        if isinstance(self.inner.model, models.WordLevel):  # an error says what it does not know
            return []
        unknown = self._vocabulary.get(getattr(self.inner.model, "unk_token", None) or "")
        with no_panic("the tokenizer failed on a character"):
            encoded = self.inner.encode_batch_fast(seen, add_special_tokens=False)
        found = zip(seen, (encoding.ids for encoding in encoded), strict=True)
        return [c for c, ids in found if unknown in ids or not self.decode(ids).strip()]

    def _pieces(self, text: str) -> Iterator[str]:
        """Parts whose ids, one after the other, are the ids of the text."""
        return pieces(text) if self._cuttable else iter([text])

    @property
    def dtype(self) -> np.dtype:
        """The narrowest that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode_rendered(self, text: Rendered) -> Encoded:
        """The ids of what a chat template wrote: special tokens where all characters of the name are the template's.

        In a message the name is text like any other; transformers' `apply_chat_template`, which this equals otherwise,
        reads it as the token. Added tokens that are not special (`<think>`, in some) are read anywhere, as in `encode`.

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
        """Each text in tokens, written out; words and characters also where the vocabulary lacks them."""
        if isinstance(self.inner.model, models.WordLevel):
            return [text.split() if self._words else list(text) for text in texts]
        return [[self.name_of(token) for token in ids] for ids in self.encode_batch(texts)]

    def special_ids(self, text: str) -> list[int]:
        """The special tokens whose names stand in a text."""
        return [token for _, _, token in self._special.find(text)]

    def name_of(self, token: int) -> str:
        """How an id is written in the vocabulary; empty: there is no such id."""
        return self.inner.id_to_token(token) or ""

    def text_of(self, token: int) -> str:
        """The text of a token that stands alone; of one that has none, such as a special one, how it is written."""
        return self.decode([token]) or self.name_of(token)

    def names(self, ids: Sequence[int]) -> list[str]:
        """Each token as text, a special one by its name; a character that several make is at the last of them."""
        found = alone = [self.decode([token]) for token in ids]
        if any("\ufffd" in name for name in alone):
            texts = [self.decode(ids[:n]).rstrip("\ufffd") for n in range(len(ids) + 1)]
            found = [text[len(before) :] for before, text in itertools.pairwise(texts)]
        return [own if text else self.name_of(token) for token, text, own in zip(ids, alone, found, strict=True)]

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
        with no_panic("the tokenizer failed on this text"):
            encoding = self._twin(special=special).encode(text, add_special_tokens=False)
        return Encoded(encoding.ids, encoding.offsets)

    def _twin(self, *, special: bool) -> tokenizers.Tokenizer:
        """The same that adds nothing around a text, and reads the names of special tokens, or does not."""
        if special not in self._twins:
            twin = tokenizers.Tokenizer.from_str(self.inner.to_str())
            twin.encode_special_tokens = not special
            twin.post_processor = None
            self._twins[special] = twin
        return self._twins[special]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens have none. Bytes that are not UTF-8 become U+FFFD."""
        with no_panic("the tokenizer failed on these ids"):
            return self.inner.decode(ids, skip_special_tokens=True)

    def stream(self, after: Sequence[int] = ()) -> TextStream:
        """A decoder for ids that come one at a time, behind others, whose text is not repeated.

        Some tokenizers write a word without its space where a text begins.
        """
        stream, start = TextStream(self.decode, self._bytes), max(0, len(after) - 4)  # the longest character takes 4
        while start and after[start] in self._bytes:
            start -= 1
        for token in after[start:]:
            stream.push(token)
        stream.flush()
        return stream

    @cached_property
    def _bytes(self) -> frozenset[int]:
        """The ids of bytes that the library decodes together; and of special tokens, over which it does so."""
        found = {i for name, i in self._vocabulary.items() if re.fullmatch("<0x[0-9A-F]{2}>", name)}
        return frozenset(found | set(self._special.ids)) if found else frozenset()

    @property
    def _words(self) -> bool:
        """Whether white space parts the tokens."""
        return str(self.inner.pre_tokenizer) == str(WORDS)

    def _unknown(self, texts: Sequence[str]) -> ConfigError | None:
        what = "word" if self._words else "character"
        for text in texts:
            if half := next((c for c in text if "\ud800" <= c <= "\udfff"), None):
                return ConfigError(f"{half!r} is half a surrogate pair, which is no character; remove it")
            for unit in text.split() if self._words else text:
                if unit not in self._vocabulary and isinstance(self.inner.model, models.WordLevel):
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
        self.ids = sorted(tokens, key=lambda i: -len(tokens[i].content))
        self.named = {token.content: i for i, token in tokens.items()}.get
        self._pattern = re.compile("|".join(_pattern(tokens[i]) for i in self.ids)) if tokens else None

    def find(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, id) of each."""
        found = self._pattern.finditer(text) if self._pattern else ()
        return [(match.start(), match.end(), self.ids[(match.lastindex or 1) - 1]) for match in found]

    def holds(self, encoded: Encoded, wanted: Sequence[tuple[int, int, int]]) -> bool:
        """Whether the special tokens are those, in those places, and no others."""
        pairs = zip(encoded.places, encoded.ids, strict=True)
        return [(start, end, token) for (start, end), token in pairs if token in self.ids] == list(wanted)


def _pattern(token: tokenizers.AddedToken) -> str:
    before, after = r"\s*" * token.lstrip, r"\s*" * token.rstrip
    return f"({before}{re.escape(token.content)}{after})"


def _is_cuttable(inner: tokenizers.Tokenizer) -> bool:
    """Whether the ids of a text are those of its pieces (`pieces`): it splits as our own tokenizers do."""
    known = {str(BYTES), str(CHARACTERS)}
    only_special = all(token.special for token in inner.get_added_tokens_decoder().values())
    return str(inner.pre_tokenizer) in known and inner.normalizer is None and only_special
