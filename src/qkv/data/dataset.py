"""Prepared corpora: two splits of token ids (or vectors) in memory-mapped files, made once and kept in the cache."""

import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, final, runtime_checkable

import numpy as np

from qkv.data.chat import template_of
from qkv.data.conversations import Example, encode_example
from qkv.data.sources import SourceConfig, in_files
from qkv.data.tokenizer import Tokenizer
from qkv.data.tokenizer_configs import TokenizerConfig
from qkv.disk import write_whole
from qkv.errors import ConfigError, FileError
from qkv.fetch import cache_dir, caching

MANY_DOCUMENTS: Final = 100
"""From so many documents on, whole ones are held out."""

HeldOut = float | str | tuple[str, ...]
"""A share of a corpus, or the path of files (see `FilesConfig`)."""

_FORMAT: Final = 2
_SPLITS: Final = ("train", "validation")


@runtime_checkable
class Corpus(Protocol):
    """What `prepare` reads: a source, how its text becomes ids, and the share that is held out."""

    @property
    def source(self) -> SourceConfig: ...
    @property
    def tokenizer(self) -> TokenizerConfig | None: ...
    @property
    def validation(self) -> HeldOut: ...


@final
@dataclass(frozen=True, eq=False)
class Split:
    """Documents, one after the other.

    A document of text is its end-of-text token, its tokens, and the end-of-text token again: the first predicts how a
    document begins, the last is predicted. A conversation is what the chat template makes of it.

    Attributes:
        values: Token ids (n_tokens,), or vectors (n_tokens, features); often memory-mapped.
        offsets: Where each document begins, and the end of the last; (n_documents + 1,).
        n_bytes: UTF-8 bytes of the text, without the end-of-text tokens; of conversations, of what the assistant says;
            None for vectors.
        counted: Which tokens count as targets, (n_tokens,); None: all.
    """

    values: np.ndarray
    offsets: np.ndarray
    n_bytes: int | None
    counted: np.ndarray | None = None

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        """Number of tokens, end-of-text tokens included; for vectors the number of steps."""
        return len(self.values)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens and where documents begin."""
        digest = hashlib.sha256(self.offsets.tobytes())
        digest.update(np.ascontiguousarray(self.values).data)
        if self.counted is not None:
            digest.update(np.ascontiguousarray(self.counted).data)
        return digest.hexdigest()

    @classmethod
    def from_text(
        cls,
        tokenizer: Tokenizer,
        documents: Iterable[str],
        begin_id: int | None = None,
        *,
        bare: bool = False,
        of: str = "the documents",
    ) -> "Split":
        """A split in memory, for example to evaluate a trained model on any text.

        Args:
            tokenizer: Text to ids.
            documents: The texts.
            begin_id: What each begins with; None: the token that ends one.
            bare: Leave out what begins and what ends one.
            of: What errors call the texts.

        Raises:
            ConfigError: The tokenizer has no end-of-text token, or does not know a character.
            FileError: There is no text.
        """
        encoded = _encode(tokenizer, documents, begin_id, bare=bare)
        return cls._of(encoded, f"{of}: there is no text in it; give files with text")

    @classmethod
    def from_conversations(
        cls, tokenizer: Tokenizer, conversations: Iterable[Example], *, of: str = "the documents"
    ) -> "Split":
        """The same of conversations, in the words of the tokenizer's chat template.

        Raises:
            ConfigError: The tokenizer has no chat template, or it does not take such messages.
            FileError: There is no conversation.
        """
        nothing = f"{of}: there is no conversation in it; give files with one"
        return cls._of(_encode_conversations(tokenizer, conversations), nothing)

    @classmethod
    def from_vectors(cls, sequences: Iterable[np.ndarray]) -> "Split":
        """The same of vectors, each sequence (T, features); `FileError` where there is none of two vectors or more."""
        return cls._of(_long_enough(sequences), "the data: no sequence in it has two vectors; give longer ones")

    @classmethod
    def _of(cls, documents: "Iterable[_Document]", nothing: str) -> "Split":
        encoded = list(documents)
        if not encoded:
            raise FileError(nothing)
        offsets = np.cumsum([0, *(len(document.values) for document in encoded)])
        values = np.concatenate([document.values for document in encoded])
        counted = [document.counted for document in encoded if document.counted is not None]
        n_bytes = None if values.ndim == 2 else sum(document.n_bytes for document in encoded)
        return cls(values, offsets, n_bytes, np.concatenate(counted) if counted else None)


@final
@dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared corpus.

    Attributes:
        train: What to train on.
        validation: What was held out.
        tokenizer: Text to ids; None for vectors.
    """

    train: Split
    validation: Split
    tokenizer: Tokenizer | None

    @property
    def n_features(self) -> int | None:
        """Width of a vector; None for text."""
        return self.train.values.shape[1] if self.train.values.ndim == 2 else None


def check_held_out(source: SourceConfig, validation: HeldOut) -> None:
    """Raise `ConfigError` where it is no share from 0 to below 1, nor the path of files like those of the source."""
    if not isinstance(validation, float | int):
        in_files(source, validation)
    elif not 0 <= validation < 1:
        raise ConfigError(f"validation={validation} must be above 0 and below 1; 0.05 holds out 5 %, and 0 nothing")


def prepare(config: Corpus, tokenizer: Tokenizer | None = None, *, bare: bool = False) -> Dataset:
    """Read the corpus, train the tokenizer and encode, or take all that from the cache if nothing has changed.

    The cache is `cache_dir()/tokens/<key>`, where the key is a hash of the documents, the tokenizer's config and
    `validation`. BPE is trained on the training split only.

    Args:
        config: The corpus.
        tokenizer: To use one that exists, instead of one that the config says how to get.
        bare: Leave out what begins and what ends a text.

    Raises:
        ConfigError: The tokenizer has no end-of-text token, or the source is text and there is no tokenizer.
        FileError: The corpus is missing, damaged or too short, or the cache cannot be written.
    """
    if config.source.holds != "vectors" and config.tokenizer is None and tokenizer is None:
        tag = config.source.tag()
        raise ConfigError(f"the source {tag} is text, but there is no tokenizer; add one, for example BPETokenizer")
    digest, n_documents = _survey(config, tokenizer, bare)
    folder = cache_dir() / "tokens" / digest
    if (known := _open(folder)) is not None:
        return known
    if tokenizer is None and (how := config.tokenizer) is not None:
        divided = _divide(config, n_documents)
        tokenizer = how.train(train + out if how.reads_validation else train for train, out in divided)
    with caching(folder):
        _publish(config, n_documents, tokenizer, folder, bare)
    made = _open(folder)
    assert made is not None
    return made


def _survey(config: Corpus, tokenizer: Tokenizer | None, bare: bool) -> tuple[str, int]:
    """The key of the cache, and the number of documents."""
    identity = config.tokenizer.identity() if config.tokenizer else tokenizer and tokenizer.identity()
    digest = hashlib.sha256(json.dumps([_FORMAT, config.validation, identity, bare]).encode())
    n_documents = 0
    for document, out in _documents(config):
        n_documents += not out
        data = document.encode("utf-8") if isinstance(document, str) else document.tobytes()
        digest.update(f"{len(data)} {document.shape if isinstance(document, np.ndarray) else ()}".encode())
        digest.update(data)
    return digest.hexdigest(), n_documents


# --- what is held out -------------------------------------------------------------------------------------------------


def _documents(config: Corpus) -> Iterator[tuple[Any, bool]]:
    """The documents to divide, and those of files that are held out."""
    yield from ((document, False) for document in config.source.documents())
    if not isinstance(config.validation, float | int):
        other = in_files(config.source, config.validation)
        yield from ((document, True) for document in other.documents())


def _divide(config: Corpus, n: int) -> Iterator[tuple[Any, Any]]:
    """Of each of the `n` documents the part to train on and the part that is held out; either may be empty."""
    share = config.validation if isinstance(config.validation, float | int) else 0.0
    numbers = held_out(n, share) if share else set[int]()
    for i, (document, out) in enumerate(_documents(config)):
        nothing = None if isinstance(document, Example) else document[:0]
        if share == 0 or isinstance(document, Example) or n >= MANY_DOCUMENTS:
            yield (nothing, document) if out or i in numbers else (document, nothing)
        else:
            place = _cut(document, share)
            yield document[:place], document[place:]


def held_out(n: int, share: float) -> set[int]:
    """The numbers of the documents to hold out: those with the lowest hash (splitmix64)."""
    x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    count = min(max(round(n * share), 1), n - 1)
    return set(np.argsort(x ^ (x >> np.uint64(31)), kind="stable")[:count].tolist())


def _cut(document: str | np.ndarray, share: float) -> int:
    held_out = math.ceil(len(document) * share)
    place = len(document) - held_out
    if isinstance(document, str):  # a line end far away would hold out too much
        return document.rfind("\n", max(place - held_out, 0), place) + 1 or place
    return place


# --- encoding ---------------------------------------------------------------------------------------------------------


class _Document(NamedTuple):
    """A document as it is written: its values, its UTF-8 bytes, and which values count as targets (None: all)."""

    values: np.ndarray
    n_bytes: int
    counted: np.ndarray | None = None


def _encode(
    tokenizer: Tokenizer, documents: Iterable[str], begin_id: int | None = None, *, bare: bool = False
) -> Iterator[_Document]:
    """Of each document that holds text: its ids between what begins and what ends one, and its UTF-8 bytes."""
    end = tokenizer.end_of_text
    if end is None and not bare:
        raise ConfigError(
            "the tokenizer has no end-of-text token to put between documents; name it with end_of_text=ID"
        )
    around = [] if bare else [end if begin_id is None else begin_id, end]
    before, after = (np.array(part, dtype=tokenizer.dtype) for part in (around[:1], around[1:]))
    sizes = deque[int]()

    seen, lost = set[str](), set[str]()

    def measured() -> Iterator[str]:
        for text in filter(None, documents):
            lost.update(tokenizer.lost(set(text) - seen))
            seen.update(text)
            sizes.append(len(text.encode("utf-8", "surrogatepass")))
            yield text

    for ids in tokenizer.encode_arrays(measured()):
        yield _Document(np.concatenate([before, ids, after]), sizes.popleft())
    if lost:
        warnings.warn(
            f"the tokenizer has no token for {len(lost)} of the {len(seen)} characters of the text, such as "
            f"{', '.join(map(repr, sorted(lost)[:5]))}; they are left out, or read as unknown",
            stacklevel=2,
        )


def _encode_conversations(tokenizer: Tokenizer, conversations: Iterable[Example]) -> Iterator[_Document]:
    template = template_of(tokenizer)
    if template is None:
        raise ConfigError(
            "the source is conversations and the model has no chat template; take a model made for chat (its "
            "folder has a chat_template.jinja, or a chat_template in tokenizer_config.json)"
        )
    for conversation in filter(None, conversations):
        ids, counted, n_bytes = encode_example(tokenizer, template, conversation)
        yield _Document(np.array(ids, dtype=tokenizer.dtype), n_bytes, counted)


def _long_enough(sequences: Iterable[np.ndarray]) -> Iterator[_Document]:
    """Those of vectors that have something to predict."""
    return (_Document(vectors, 0) for vectors in sequences if len(vectors) > 1)


def _encoded(config: Corpus, n: int, tokenizer: Tokenizer | None, part: int, bare: bool) -> Iterator[_Document]:
    documents = (parts[part] for parts in _divide(config, n))
    if tokenizer is None:
        return _long_enough(documents)
    if config.source.holds == "conversations":
        return _encode_conversations(tokenizer, documents)
    return _encode(tokenizer, documents, bare=bare)


# --- files: <split>.values, .offsets and .counted are raw arrays, dataset.json says of what ---------------------------


def _publish(config: Corpus, n: int, tokenizer: Tokenizer | None, folder: Path, bare: bool = False) -> None:
    """Write the dataset beside its place, then move it there, so that it is whole or not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-", ignore_cleanup_errors=True) as name:
        temporary = Path(name)
        facts = {
            name: _write(temporary, name, _encoded(config, n, tokenizer, part, bare))
            for part, name in enumerate(_SPLITS)
        }
        if not n:
            raise FileError(
                f"{config.source.describe()}: there is nothing in it; give files with {config.source.holds}"
            )
        if not facts["train"]["n_documents"] or (config.validation and not facts["validation"]["n_documents"]):
            train, out = (f"{fact['n_documents']} documents with {fact['n_tokens']} tokens" for fact in facts.values())
            raise FileError(
                f"{config.source.describe()}: the corpus of {n} documents is too short to hold out {config.validation} "
                f"of it: {train} to train on, {out} held out; give more data or another `validation`"
            )
        if tokenizer is not None:
            tokenizer.save(temporary)
        sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
        write_whole(temporary / "dataset.json", [json.dumps({"sizes": sizes, **facts}).encode()])
        try:
            temporary.rename(folder)
        except OSError:
            if _open(folder) is None:  # damaged: the other case is that another process was faster
                shutil.rmtree(folder)
                temporary.rename(folder)


def _write(folder: Path, name: str, documents: Iterator[_Document]) -> dict[str, Any]:
    """Write a split; returns what `_map` reads it by."""
    offsets, n_bytes, dtype, shape = [0], 0, "uint16", ()
    counted: list[np.ndarray] = []
    with (folder / f"{name}.values").open("wb") as file:
        for values, size, part in documents:
            counted += [] if part is None else [part]
            dtype, shape = values.dtype.name, values.shape[1:]
            file.write(values.tobytes())
            offsets.append(offsets[-1] + len(values))
            n_bytes += size
        file.flush()
        os.fsync(file.fileno())
    write_whole(folder / f"{name}.offsets", [np.array(offsets, dtype=np.int64)])
    if counted:
        write_whole(folder / f"{name}.counted", counted)
    return {
        "dtype": dtype,
        "features": shape[0] if shape else None,
        "counted": bool(counted),
        "n_bytes": None if shape else n_bytes,
        "n_documents": len(offsets) - 1,
        "n_tokens": offsets[-1],
    }


def _open(folder: Path) -> Dataset | None:
    """The dataset in a folder, or None where there is none or a file has not the size that was written."""
    try:
        facts: dict[str, Any] = json.loads((folder / "dataset.json").read_bytes())
        if any((folder / name).stat().st_size != size for name, size in facts["sizes"].items()):
            return None
    except (OSError, ValueError):
        return None

    def split(name: str) -> Split:
        values, fact = folder / f"{name}.values", facts[name]
        shape = (fact["n_tokens"],) if fact["features"] is None else (fact["n_tokens"], fact["features"])
        return Split(
            np.memmap(values, dtype=fact["dtype"], mode="r", shape=shape)
            if shape[0]
            else np.zeros(shape, fact["dtype"]),
            np.fromfile(values.with_suffix(".offsets"), dtype=np.int64),
            fact["n_bytes"],
            np.memmap(values.with_suffix(".counted"), dtype=np.bool_, mode="r") if fact["counted"] else None,
        )

    tokenizer = Tokenizer.load(folder) if "tokenizer.json" in facts["sizes"] else None
    return Dataset(split("train"), split("validation"), tokenizer)
