"""Tokenizers from the metadata of GGUF files, and back.

Two kinds of vocabularies: byte-level BPE (`gpt2`), whose merges are listed and whose words are split by a rule that the
file names; and those of SentencePiece (`llama`), which merge by the scores of the tokens. Which of them are held to the
vectors of llama.cpp: `tests/parity/test_gguf_vocabulary.py`.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast, final

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from qkv.data.tokenizer import Tokenizer
from qkv.data.tokenizer_configs import MAX_VOCAB_SIZE
from qkv.data.tokenizer_files import no_panic, quiet
from qkv.errors import ConfigError, FileError

T = TypeVar("T")

MAX_MERGES: Final = 1 << 20
MAX_CHARACTERS: Final = 1 << 22  # in the tokens of a vocabulary that merges by scores: each place to cut costs time
MAX_TOKEN: Final = 1000  # characters

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # types of tokens

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_MARKS = r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN35 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|{_MARKS}"
_DIGITS = (r"\p{N}", _GPT2)
_SIGNS = r"[\p{P}\$\+<=>\^~\|]+"
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


@final
@dataclass(frozen=True)
class _Rule:
    """How text is split into words before it is merged.

    Attributes:
        splits: Regular expressions, one after the other, each cutting what the one before left.
        whole: Whether a word that is a token is taken as it is, whatever the merges.
        compose: Whether characters are composed (NFC) first.
    """

    splits: tuple[str, ...]
    whole: bool = False
    compose: bool = False


RULES: Final[dict[str, _Rule]] = {
    "gpt-2": _Rule((_GPT2,)),
    "olmo": _Rule((_GPT2,)),
    "mpt": _Rule((_GPT2,)),
    "smollm": _Rule(_DIGITS),
    "starcoder": _Rule(_DIGITS),
    "refact": _Rule(_DIGITS),
    "command-r": _Rule(_DIGITS),
    "llama-bpe": _Rule((_LLAMA3,), whole=True),
    "qwen2": _Rule((_QWEN2,), compose=True),
    "qwen35": _Rule((_QWEN35,)),
    "falcon": _Rule((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "deepseek-coder": _Rule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN, r"\p{N}")),
    "default": _Rule((_SIGNS, _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "deepseek-r1-qwen": _Rule((_QWEN2,)),
}  # fmt: skip
"""By `tokenizer.ggml.pre`."""
_ALIASES: Final = {
    "gpt-2": (
        "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum", "exaone4", "jais",
        "trillion", "granite-docling",
    ),
    "smollm": ("codeshell", "exaone", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "deepseek-r1-qwen": ("kormo", "megrez", "stablelm2", "hunyuan"),
}  # fmt: skip
"""Further names that llama.cpp has for the same."""
RULES.update({alias: RULES[name] for name, aliases in _ALIASES.items() for alias in aliases})


@final
@dataclass(frozen=True)
class Vocabulary:
    """What a file says about text.

    Attributes:
        tokenizer: Text to ids and back, with the file's chat template.
        begin_id: The token that begins a text, if there is one.
        add_begin: Whether the model is used to it: a prompt is to begin with it.
        stop_ids: Tokens that end a text or a turn.
    """

    tokenizer: Tokenizer
    begin_id: int | None
    add_begin: bool
    stop_ids: tuple[int, ...]


def read_vocabulary(metadata: Mapping[str, Any], *, source: str) -> Vocabulary:
    """The vocabulary of a GGUF file.

    Args:
        metadata: The file's, as plain values.
        source: What errors call the file.

    Raises:
        FileError: A kind of vocabulary or a rule of splitting that qkv does not know, or one that is damaged.
    """
    reader = _Reader(metadata, source)
    model = reader.get("model", str)
    makers = {"gpt2": _byte_level, "llama": _scored}
    if model not in makers:
        raise reader.error("model", f"is {model!a}, and qkv reads {', '.join(makers)}")
    if model == "gpt2" and "tokenizer.ggml.pre" not in metadata:
        reason = "does not say how words are split ('tokenizer.ggml.pre'), so llama.cpp's default rule is taken"
        warnings.warn(
            f"{source}: {reason}; where it is another, answers are worse: convert the model anew", stacklevel=2
        )
    tokens = reader.strings("tokens", MAX_VOCAB_SIZE)
    if len(set(tokens)) < len(tokens):
        raise reader.error("tokens", "has a token twice")
    typed = "tokenizer.ggml.token_type" in metadata
    types = reader.numbers("token_type", len(tokens)) if typed else [NORMAL] * len(tokens)
    if not isinstance(template := metadata.get("tokenizer.chat_template"), str | None):
        raise FileError(f"{source}: 'tokenizer.chat_template' must be of type str; use another file")
    with no_panic(f"{source}: 'tokenizer.ggml' is not a vocabulary that can be used"), quiet():
        inner = makers[model](reader, tokens, types)
        special = [AddedToken(tokens[i], special=True, normalized=False) for i, t in enumerate(types) if t == CONTROL]
        words = [AddedToken(tokens[i], normalized=False) for i, t in enumerate(types) if t == USER]
        inner.add_special_tokens([token for token in special if token.content])
        inner.add_tokens([token for token in words if token.content])
    if inner.get_vocab_size() != len(tokens):
        raise reader.error("tokens", "does not give each id one token")
    end = reader.id("eos_token_id", len(tokens))
    stops = {reader.id(f"{name}_token_id", len(tokens)) for name in ("eos", "eot", "eom")}
    begin = reader.id("bos_token_id", len(tokens))
    return Vocabulary(
        tokenizer=Tokenizer(inner, end_of_text=end, begin_of_text=begin, chat_template=template),
        begin_id=begin,
        add_begin=reader.get("add_bos_token", bool, model == "llama" or _rule(reader).whole),
        stop_ids=tuple(sorted(stop for stop in stops if stop is not None)),
    )


def write_vocabulary(tokenizer: Tokenizer, *, begin_id: int | None = None, size: int = 0) -> dict[str, Any]:
    """The metadata of a byte-level BPE tokenizer. What came from a GGUF file is better carried over from there.

    Tokens are added up to `size`, the rows of the model's table, since llama.cpp takes their number from the list.

    Raises:
        ConfigError: It is another kind, or splits words in a way that GGUF has no name for.
    """
    data = json.loads(tokenizer.to_json())
    model = data["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or not model["merges"]:
        raise ConfigError(
            f"a GGUF file cannot hold this tokenizer ({model['type']}): qkv writes byte-level BPE, and what a GGUF "
            "file had; write a Hugging Face folder instead"
        )
    added = {token["content"]: (token["id"], token["special"]) for token in data["added_tokens"]}
    ids = model["vocab"] | {token: i for token, (i, _) in added.items()}
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise ConfigError(
            "a GGUF file cannot hold this tokenizer: its ids have gaps; write a Hugging Face folder instead"
        )
    if 0 < size < len(tokens):
        raise ConfigError(f"the tokenizer has {len(tokens)} tokens and the model {size}; give the model's own")
    if begin_id is not None and begin_id >= max(size, len(tokens)):
        raise ConfigError(f"the begin token is {begin_id}, and there are {len(tokens)} tokens; fix 'bos_token_id'")
    types = [NORMAL if token not in added else CONTROL if added[token][1] else USER for token in tokens]
    types += [UNUSED] * (size - len(tokens))
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]  # as llama.cpp's converter calls them
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    made = {"model": "gpt2", "pre": _rule_of(data), "tokens": tokens, "token_type": types, "merges": merges}
    specials = {"eos_token_id": tokenizer.end_of_text, "bos_token_id": begin_id}
    made |= {key: value for key, value in specials.items() if value is not None}
    return {f"tokenizer.ggml.{key}": value for key, value in made.items()} | {"tokenizer.ggml.add_bos_token": False}


# --- the two kinds --------------------------------------------------------------------------------------------------


def _rule(reader: "_Reader") -> _Rule:
    name = reader.get("pre", str, "default")
    if name not in RULES:
        raise reader.error("pre", f"is {name!a}, and qkv knows {', '.join(RULES)}")
    return RULES[name]


def _byte_level(reader: "_Reader", tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    rule = _rule(reader)
    merges = reader.strings("merges", MAX_MERGES)
    if not all(" " in merge[1:] for merge in merges):
        raise reader.error("merges", "must have two tokens in each, with a space between")
    pairs = [(merge[: (cut := merge.index(" ", 1))], merge[cut + 1 :]) for merge in merges]
    ids = {token: i for i, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(models.BPE(ids, pairs, ignore_merges=rule.whole))
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in rule.splits]
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    if rule.compose:
        inner.normalizer = normalizers.NFC()
    return inner


def _scored(reader: "_Reader", tokens: list[str], types: list[int]) -> tokenizers.Tokenizer:
    """SentencePiece's greedy merging: of all neighbours, the two whose token has the highest score."""
    scores = reader.numbers("scores", len(tokens))
    if max(map(len, tokens)) > MAX_TOKEN or sum(map(len, tokens)) > MAX_CHARACTERS:
        raise reader.error("tokens", f"has more than {MAX_TOKEN} characters in one or {MAX_CHARACTERS} in all")
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    merges = _merges(tokens, types, scores)
    ids = {token: i for i, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    prefix = reader.get("add_space_prefix", bool, True)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space] if prefix else [space])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return inner


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, those first that are merged first."""
    usable = {token: i for i, token in enumerate(tokens) if types[i] in (NORMAL, USER)}
    order = sorted(usable.items(), key=lambda item: (-scores[item[1]], item[1]))
    return [
        (token[:cut], token[cut:])
        for token, _ in order
        for cut in range(1, len(token))
        if token[:cut] in usable and token[cut:] in usable
    ]


def _rule_of(data: Mapping[str, Any]) -> str:
    """The name of a tokenizer's way to split words."""
    outer: dict[str, Any] = data["pre_tokenizer"] or {}
    splits = tuple(split for step in outer.get("pretokenizers", [outer]) for split in _splits(step))
    normalizer = (data["normalizer"] or {"type": None})["type"]
    found = _Rule(splits, data["model"].get("ignore_merges", False), compose=normalizer == "NFC")
    for name, rule in RULES.items():
        if normalizer in (None, "NFC") and rule == found:
            return name
    raise ConfigError(
        "a GGUF file cannot hold this tokenizer: its way to split words has no name there that qkv knows; "
        "write a Hugging Face folder instead"
    )


def _splits(step: Mapping[str, Any]) -> list[str]:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use}:
            return [_GPT2] if use else []
        case {"type": "Digits", "individual_digits": True}:
            return [r"\p{N}"]
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return [pattern]
    return [f"unknown: {step.get('type')}"]


# --- reading values -------------------------------------------------------------------------------------------------


@final
class _Reader:
    """Takes values of `tokenizer.ggml` and says what is wrong with them."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self._source = source

    def error(self, key: str, problem: str) -> FileError:
        return FileError(f"{self._source}: 'tokenizer.ggml.{key}' {problem}; use another file")

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if type(value) is not kind:
            raise self.error(key, "is missing" if value is None else f"must be of type {kind.__name__}")
        return cast(T, value)

    def id(self, key: str, size: int) -> int | None:
        if f"tokenizer.ggml.{key}" not in self._metadata:
            return None
        value = self.get(key, int)
        if not 0 <= value < size:
            raise self.error(key, f"is {value}, and there are {size} tokens")
        return value

    def strings(self, key: str, at_most: int) -> list[str]:
        values: list[Any] = self.get(key, list)
        if not 0 < len(values) <= at_most or not all(isinstance(value, str) for value in values):
            raise self.error(key, f"must be a list of 1 to {at_most} texts")
        return values

    def numbers(self, key: str, count: int) -> list[Any]:
        values: list[Any] = self.get(key, list)
        if len(values) != count or not all(type(value) in (int, float) and value == value for value in values):
            raise self.error(key, f"must be a list of {count} numbers")
        return values
