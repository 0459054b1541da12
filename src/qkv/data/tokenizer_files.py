"""Reading a tokenizer's files, which may come from a stranger: bounded, and with the library's panics caught."""

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import tokenizers

from qkv.errors import FileError, QkvError

_MAX_FILE_BYTES: Final = 1 << 28
_MAX_SETTINGS_BYTES: Final = 1 << 22
_MAX_GROWTH: Final = 1000
_MAX_ADDED: Final = 1000
_TWO_FILES: Final = ("vocab.json", "merges.txt")
_OLDER: Final = (*_TWO_FILES, "vocab.txt", "tokenizer.model")
_FAMILIES: Final = {"gpt2": "GPT2Tokenizer", "roberta": "RobertaTokenizer", "bert": "BertTokenizer"}
_ROLES: Final[dict[str, dict[str, str]]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>"),
    "RobertaTokenizer": {"cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"},
    "BertTokenizer": {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"},
}
_TRIAL: Final = "a A1 é\n\u4e00\U0001f600 ."


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a file of a tokenizer, though it may be of a kind that cannot be read."""
    return any((folder / name).is_file() for name in ("tokenizer.json", *_OLDER))


def read_inner(path: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer from a `tokenizer.json`, or the files before it, once they have been found harmless.

    Args:
        path: The file, or the folder that has it.

    Raises:
        FileError: The file is missing or damaged, is of another kind, or would take any memory or time.
    """
    path = path / "tokenizer.json" if path.is_dir() else path
    older = not path.is_file() and has_tokenizer(path.parent)
    with no_panic(f"{path}: not a tokenizer.json that can be read"), quiet():
        data = _from_older(path.parent) if older else _read(path, _MAX_FILE_BYTES)
        inner = tokenizers.Tokenizer.from_buffer(data)
        inner.no_truncation()
        inner.no_padding()
        largest = max(inner.get_vocab().values(), default=-1)
        _check_bounds(inner)
        with contextlib.suppress(Exception):  # a broken one panics now; that it does not know these says nothing
            inner.decode(inner.encode(_TRIAL, add_special_tokens=False).ids)
    if not 0 <= largest < len(data):
        raise FileError(f"{path}: the largest id is {largest}, impossible in {len(data)} bytes; get the file again")
    return inner


def _from_older(folder: Path) -> bytes:
    """The `tokenizer.json` of the files that GPT-2, RoBERTa and BERT had before there was one.

    Files of other tokenizers have these names, too, so the folder must say whose they are, and nothing more.
    """
    settings = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
    kind = settings.get("tokenizer_class") or _FAMILIES.get(str(_json(folder / "config.json").get("model_type")))
    kind = str(kind or "an unknown tokenizer").removesuffix("Fast")
    files, roles = (("vocab.txt",) if kind == "BertTokenizer" else _TWO_FILES), _ROLES.get(kind, {})
    there = tuple(name for name in (*_OLDER, "added_tokens.json") if (folder / name).is_file())
    vocab = _vocabulary(folder / files[0]) if roles and there == files else {}
    added = [*(settings.get("added_tokens_decoder") or {}).values(), *(settings.get("additional_special_tokens") or ())]
    said = {
        role: _content(settings.get(f"{role}_token")) for role in ("bos", "eos", "cls", "sep", "unk", "pad", "mask")
    }
    named = roles | {role: name for role, name in said.items() if name is not None}
    special, mask = {*named.values(), *map(_content, added)}, named.get("mask")
    strips = (token for token in added if isinstance(token, dict) and (token.get("lstrip") or token.get("rstrip")))
    odd = [token for token in strips if token.get("rstrip") or _content(token) != mask]
    odd += [key for key in ("add_bos_token", "add_prefix_space") if settings.get(key)]
    odd += [key for key in ("do_basic_tokenize",) if settings.get(key) is False]
    if odd or not vocab or not special <= vocab.keys():
        found = f"has {', '.join(there)} of {kind}, and without a tokenizer.json qkv reads"
        remedy = (
            "the plain files of GPT-2, RoBERTa and BERT alone; AutoTokenizer.from_pretrained(…).save_pretrained(…) "
            "makes one"
        )
        raise FileError(f"{folder}: {found} {remedy}")
    # A mask takes the place of a word with the space before it, which tokens of words of these two have.
    strip = {mask} if files == _TWO_FILES else set[str]()
    flags = dict.fromkeys(("single_word", "rstrip", "normalized"), False) | {"special": True}
    tokens = sorted(special, key=lambda token: vocab[token])
    frame = {role: [named[role], vocab[named[role]]] for role in ("cls", "sep") if role in roles}
    words = kind == "BertTokenizer"
    parts = _words(vocab, named["unk"], settings, frame) if words else _bytes(vocab, folder, frame)
    shared = {"added_tokens": [{"id": vocab[t], "content": t, "lstrip": t in strip} | flags for t in tokens]}
    return json.dumps(parts | shared).encode()


def _vocabulary(path: Path) -> dict[str, int]:
    """The ids of tokens: of a JSON object, or the numbers of lines."""
    if path.suffix == ".json":
        return _json(path, _MAX_FILE_BYTES)
    lines = _read(path, _MAX_FILE_BYTES).decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
    return {token: i for i, token in enumerate(lines)}


def _words(
    vocab: dict[str, int], unknown: str, settings: dict[str, Any], frame: dict[str, list[Any]]
) -> dict[str, Any]:
    """BERT's: WordPiece over words and signs, which are made lower case, without accents, where the settings say so."""
    model = {"type": "WordPiece", "vocab": vocab, "unk_token": unknown, "continuing_subword_prefix": "##"}
    normal = {
        "lowercase": settings.get("do_lower_case", True),
        "strip_accents": settings.get("strip_accents"),
        "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
    }
    return {
        "model": model | {"max_input_chars_per_word": 100},
        "normalizer": {"type": "BertNormalizer", "clean_text": True} | normal,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing"} | frame,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    }


def _bytes(vocab: dict[str, int], folder: Path, frame: dict[str, list[Any]]) -> dict[str, Any]:
    """GPT-2's: byte-pair encoding, its words with the space before them; with special tokens around, RoBERTa's."""
    lines = _read(folder / "merges.txt", _MAX_FILE_BYTES).decode("utf-8", "replace").splitlines()
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    level = {"add_prefix_space": False, "trim_offsets": True}
    splits = {"type": "ByteLevel", "use_regex": True} | level
    around = {"type": "RobertaProcessing"} | level | frame if frame else None
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return {"model": model, "pre_tokenizer": splits, "decoder": splits, "post_processor": around}


def _json(path: Path, most: int = _MAX_SETTINGS_BYTES) -> dict[str, Any]:
    """An object; empty where there is no such file."""
    try:
        data = json.loads(_read(path, most)) if path.is_file() else {}
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise FileError(f"{path}: not a JSON object; get the tokenizer again")
    return data


def _content(token: Any) -> Any:
    """The text of a special token, which may have settings."""
    return token.get("content") if isinstance(token, dict) else token


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


def read_settings(folder: Path) -> dict[str, str]:
    """The texts of `eos_token`, `bos_token`, `mask_token` and `chat_template`, where a folder's files have them.

    The template is in a `chat_template.jinja`, else in the `tokenizer_config.json` (of several, `default`).

    Raises:
        FileError: A file is damaged.
    """
    path, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    data = _json(path)
    older = _json(folder / "special_tokens_map.json")
    found = {key: _content(data.get(key) or older.get(key)) for key in ("eos_token", "bos_token", "mask_token")}
    try:
        if template.is_file():
            return _texts(found) | {"chat_template": _read(template, _MAX_SETTINGS_BYTES).decode("utf-8")}
    except UnicodeDecodeError:
        raise FileError(f"{template}: not UTF-8 text; get the file again") from None
    source = data.get("chat_template")
    if isinstance(source, list):
        named = [one for one in source if isinstance(one, dict) and one.get("name") == "default"]
        source = named[0].get("template", source) if named else source
    if not isinstance(source, str | None):
        raise FileError(f"{path}: 'chat_template' is neither a text nor a list with one named 'default'; fix the file")
    return _texts(found | {"chat_template": source})


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {key: value for key, value in values.items() if isinstance(value, str)}


def _check_bounds(inner: tokenizers.Tokenizer) -> None:
    """Refuse what would take any memory or time: replacements that multiply a text, endless special tokens."""
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
