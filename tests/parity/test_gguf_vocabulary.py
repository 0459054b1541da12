"""Vocabularies of GGUF files against the vectors that llama.cpp ships for them."""

import functools

import pytest
import tokenizers

from qkv.checkpoints.gguf import read_gguf, write_gguf
from qkv.data import BPETokenizerConfig, CharacterTokenizerConfig, Tokenizer
from qkv.data.gguf_vocabulary import RULES, read_vocabulary, write_vocabulary
from qkv.errors import ConfigError, FileError
from qkv.fetch import fetch, read_archive

ARCHIVE = ("llama-cpp-python", "0.3.36", "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e")
PASSED = ["command-r", "deepseek-coder", "falcon", "gpt-2", "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2", "qwen35",
          "refact", "starcoder"]  # fmt: skip
REFUSED = {
    "bert-bge": "'tokenizer.ggml.model' is 'bert', and qkv reads gpt2, llama",
    "deepseek-llm": "'tokenizer.ggml.pre' is 'deepseek-llm', and qkv knows gpt-2",
    "gemma-4": "'tokenizer.ggml.model' is 'gemma4'",
    "nomic-bert-moe": "'tokenizer.ggml.model' is 't5'",
}


@functools.cache
def vectors():
    try:
        found = read_archive(fetch(*ARCHIVE), "*/vendor/llama.cpp/models/ggml-vocab-*")
    except FileError as error:
        pytest.skip(f"the archive with the vocabularies cannot be had: {error}")
    return {path.rpartition("ggml-vocab-")[2]: data for path, data in found}


def vocabulary(name, folder):
    path = folder / f"{name}.gguf"
    path.write_bytes(vectors()[path.name])
    return read_vocabulary(read_gguf(path).metadata, source=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSED)
def test_the_vectors_of_llama_cpp(tmp_path, name):
    tokenizer = vocabulary(name, tmp_path).tokenizer
    # The file ends with a separator, too.
    texts = vectors()[f"{name}.gguf.inp"].decode().split("\n__ggml_vocab_test__\n")[:-1]
    ids = [[int(i) for i in line.split()] for line in vectors()[f"{name}.gguf.out"].decode().splitlines()]
    assert len(texts) == len(ids) > 40
    for text, want in zip(texts, ids, strict=True):
        assert tokenizer.encode(text) == want, text
        assert tokenizer.decode(want) == text


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_by_name(tmp_path, name):
    with pytest.raises(FileError, match=REFUSED[name]):
        vocabulary(name, tmp_path)


@pytest.mark.slow
def test_special_tokens_are_known(tmp_path):
    llama = vocabulary("llama-bpe", tmp_path)
    assert (llama.begin_id, llama.add_begin, llama.stop_ids) == (128_000, True, (128_001,))
    spm = vocabulary("llama-spm", tmp_path)
    assert (spm.begin_id, spm.add_begin, spm.stop_ids, spm.tokenizer.chat_template) == (1, True, (2,), None)
    assert spm.tokenizer.encode("</s>") != [2]  # text is only text


# --- out ------------------------------------------------------------------------------------------------------------

TEXT = "Hello there, it's 1234 o'clock\n\n  and  nothing's héllo ☃ \t done. " * 3


def test_a_tokenizer_of_ours_goes_out_and_back(tmp_path):
    ours = BPETokenizerConfig(vocab_size=300).train([TEXT])
    metadata = write_vocabulary(ours)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    write_gguf(tmp_path / "x.gguf", metadata, {})
    back = read_vocabulary(read_gguf(tmp_path / "x.gguf").metadata, source="x")
    for text in (TEXT, "<|endoftext|>"):  # the name of a special token is only text
        assert back.tokenizer.encode(text) == ours.encode(text)
    assert back.tokenizer.decode(ours.encode(TEXT)) == TEXT
    assert back.tokenizer.end_of_text == ours.end_of_text
    assert back.stop_ids == (ours.end_of_text,)
    assert back.begin_id is None


FIRST = {rule: name for name, rule in reversed(RULES.items())}  # of the names of a rule


@pytest.mark.parametrize("pre", FIRST.values())
def test_each_rule_is_found_again(pre):
    metadata = write_vocabulary(BPETokenizerConfig(vocab_size=300).train([TEXT])) | {"tokenizer.ggml.pre": pre}
    first = read_vocabulary(metadata, source="x").tokenizer
    again = write_vocabulary(first)
    assert again == metadata
    assert read_vocabulary(again, source="x").tokenizer.encode(TEXT) == first.encode(TEXT)


@pytest.mark.parametrize(("name", "alias"), [("llama-bpe", "llama3"), ("gpt-2", "phi-2"), ("smollm", "minerva-7b")])
def test_an_alias_is_the_same(name, alias):
    metadata = write_vocabulary(BPETokenizerConfig(vocab_size=300).train([TEXT]))
    del metadata["tokenizer.ggml.add_bos_token"]
    first, other = (read_vocabulary(metadata | {"tokenizer.ggml.pre": pre}, source="x") for pre in (name, alias))
    assert first.tokenizer.to_json() == other.tokenizer.to_json()
    assert first.add_begin == other.add_begin == (name == "llama-bpe")


def test_what_gguf_cannot_hold_is_refused():
    with pytest.raises(ConfigError, match=r"the begin token is 50256, and there are .* tokens; fix 'bos_token_id'"):
        write_vocabulary(BPETokenizerConfig(vocab_size=300).train([TEXT]), begin_id=50_256, size=300)
    with pytest.raises(ConfigError, match=r"cannot hold this tokenizer \(WordLevel\)"):
        write_vocabulary(CharacterTokenizerConfig().train([TEXT]))
    inner = tokenizers.Tokenizer.from_str(BPETokenizerConfig(vocab_size=300).train([TEXT]).to_json())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    with pytest.raises(ConfigError, match="its way to split words has no name there"):
        write_vocabulary(Tokenizer(inner))


DAMAGED = {
    "model": (None, "'tokenizer.ggml.model' is missing"),
    "model ": (3, "must be of type str"),
    "pre": ("gpt-5", "'tokenizer.ggml.pre' is 'gpt-5', and qkv knows gpt-2"),
    "tokens": ([], "must be a list of 1 to"),
    "tokens ": (["a", 3], "must be a list of 1 to"),
    "tokens  ": (["a", "a"], "has a token twice"),
    "token_type": ([1], "must be a list of 300 numbers"),
    "merges": (["ab"], "must have two tokens in each"),
    "merges ": (["x y"], "not a vocabulary that can be used"),
    "eos_token_id": (300, "is 300, and there are 300 tokens"),
    "eos_token_id ": (True, "must be of type int"),
    "add_bos_token": (1, "must be of type bool"),
}


@pytest.mark.parametrize("key", DAMAGED)
def test_a_damaged_vocabulary_is_refused(key):
    value, message = DAMAGED[key]
    metadata = write_vocabulary(BPETokenizerConfig(vocab_size=300).train([TEXT * 20]))
    metadata["tokenizer.ggml.tokens"] += [f"<{i}>" for i in range(300 - len(metadata["tokenizer.ggml.tokens"]))]
    metadata["tokenizer.ggml.token_type"] += [1] * (300 - len(metadata["tokenizer.ggml.token_type"]))
    metadata[f"tokenizer.ggml.{key.strip()}"] = value
    with pytest.raises(FileError, match=message):
        read_vocabulary(metadata, source="x")


def test_a_vocabulary_with_scores_merges_the_best_first():
    """By hand: "ab" has a higher score than "bc", and the rest is spelt in bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "c", "bc", "ab", "▁ab"]
    types = [2, 3, 3, *[6] * 256, *[1] * 7]
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0]
    names = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores, "bos_token_id": 1}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in names.items()}
    tokenizer = read_vocabulary(metadata, source="x").tokenizer
    ids = {token: i for i, token in enumerate(tokens)}
    assert tokenizer.encode("abc") == [ids["▁ab"], ids["c"]]
    assert tokenizer.encode("é") == [ids["▁"], ids["<0xC3>"], ids["<0xA9>"]]
    assert tokenizer.decode(tokenizer.encode("abc é")) == "abc é"
    plain = read_vocabulary(metadata | {"tokenizer.ggml.add_space_prefix": False}, source="x").tokenizer
    assert plain.encode("abc") == [ids["ab"], ids["c"]]
    with pytest.raises(FileError, match=r"'tokenizer\.ggml\.scores' must be a list of 266 numbers"):
        read_vocabulary(metadata | {"tokenizer.ggml.scores": [1.0]}, source="x")
