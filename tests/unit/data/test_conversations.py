"""Conversations: what a line may be, which tokens count, and how they are held out, packed and cut."""

import json
from pathlib import Path

import numpy as np
import pytest

from qkv.data import (
    IGNORE,
    BPETokenizerConfig,
    ConversationsConfig,
    PackedBatches,
    Tokenizer,
    TokenizerFileConfig,
    prepare,
)
from qkv.errors import ConfigError, FileError
from qkv.tasks import DataConfig
from runs import lengths_of

TEMPLATE = (
    "{% for m in messages %}{{ '<|endoftext|>' + m.role + ':' + m.content + '<|endoftext|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|endoftext|>assistant:' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes, and one special token that the template uses for every turn."""
    folder = tmp_path_factory.mktemp("chat")
    BPETokenizerConfig(vocab_size=257).train(["abc"]).save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer.load(folder)


def conversation(*turns: str, first: str = "user") -> dict:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def write(folder: Path, *lines: object, name: str = "chat.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / name


def made(path: Path, tokenizer: Tokenizer, validation: float = 0.3):
    return prepare(DataConfig(source=ConversationsConfig(path=str(path)), validation=validation), tokenizer)


def shown(tokenizer: Tokenizer, ids) -> str:
    return "".join("*" if i == tokenizer.end_of_text else tokenizer.decode([int(i)]) for i in ids)


def test_only_what_the_assistant_says_counts(tmp_path, tokenizer):
    """Its words and the token that ends its turn, in every one of its turns; never what the user says."""
    data = made(write(tmp_path, conversation("hi", "yo", "and", "so"), conversation("a", "b")), tokenizer)
    found = {}
    for split in (data.train, data.validation):
        assert split.counted is not None
        text = shown(tokenizer, split.values)
        found[text] = "".join(c if k else "." for c, k in zip(text, split.counted, strict=True))
    text = "*user:hi*\n*assistant:yo*\n*user:and*\n*assistant:so*\n"
    assert found[text] == "." * 21 + "yo*" + "." * 23 + "so*."
    assert found["*user:a*\n*assistant:b*\n"] == "." * 20 + "b*."


def test_bytes_are_those_that_count(tmp_path, tokenizer):
    data = made(write(tmp_path, conversation("hi", "é"), conversation("hi", "é")), tokenizer)
    assert data.train.n_bytes == data.validation.n_bytes == len("é<|endoftext|>".encode())


def test_targets_of_batches(tmp_path, tokenizer):
    """Packed side by side, and each target the token that follows, where it counts."""
    data = made(write(tmp_path, *[conversation("q" * i, "a" * i) for i in (1, 2, 3, 4)]), tokenizer)
    batches = PackedBatches(data.train, context=64, batch_size=2, seed=0, shuffle=True)
    batch = batches.batch(0, 0)
    targets = sorted(shown(tokenizer, row[row != IGNORE].numpy()) for row in batch.targets)
    held_out = shown(tokenizer, data.validation.values[np.asarray(data.validation.counted)])
    assert "".join(sorted("".join(targets) + held_out)) == "*" * 4 + "a" * 10
    for row, lengths in enumerate(lengths_of(batch.tokens)):
        end = 0
        for length in lengths:
            inputs, following = batch.inputs[row, end : end + length], batch.targets[row, end : end + length]
            counted = following[:-1] != IGNORE
            assert bool((inputs[1:][counted] == following[:-1][counted]).all())
            end += length


def test_prompt_and_response_are_a_conversation(tmp_path, tokenizer):
    short = write(tmp_path, {"prompt": "hi", "response": "yo"}, {"prompt": "a", "response": "b", "id": 7})
    long = write(tmp_path, conversation("hi", "yo"), conversation("a", "b"), name="long.jsonl")
    a, b = (made(path, tokenizer) for path in (short, long))
    assert np.array_equal(a.train.values, b.train.values)
    assert np.array_equal(a.train.counted, b.train.counted)


def test_lines_of_sharegpt_are_conversations(tmp_path, tokenizer):
    said = [{"from": "system", "value": "s"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    lines = [{"conversations": said}, {"conversations": said[1:]}]
    shared = made(write(tmp_path, *lines), tokenizer)
    plain = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in (
        [("system", "s"), ("user", "hi"), ("assistant", "yo")], [("user", "hi"), ("assistant", "yo")])]  # fmt: skip
    own = made(write(tmp_path, *plain, name="own.jsonl"), tokenizer)
    assert np.array_equal(shared.train.values, own.train.values)
    assert np.array_equal(shared.train.counted, own.train.counted)


def test_tools_and_their_roles_reach_the_template(tmp_path, tokenizer):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    turns = [{"role": "developer", "content": "d"}, {"role": "user", "content": "u", "name": "Ann"}, call,
             {"role": "tool", "content": "t", "tool_call_id": "1"}, {"role": "assistant", "content": "a"}]  # fmt: skip
    (example, _) = ConversationsConfig(
        path=str(write(tmp_path, {"messages": turns, "tools": [{"name": "f"}]}, conversation("a", "b")))
    ).documents()
    assert list(example.messages) == turns
    assert example.tools == [{"name": "f"}]


def test_a_special_token_in_a_message_is_text(tmp_path, tokenizer):
    """Nobody ends a turn by writing its end."""
    data = made(write(tmp_path, conversation("x<|endoftext|>y", "b"), conversation("x<|endoftext|>y", "b")), tokenizer)
    assert shown(tokenizer, data.train.values) == "*user:x<|endoftext|>y*\n*assistant:b*\n"


def test_whole_conversations_are_held_out_also_of_few(tmp_path, tokenizer):
    data = made(write(tmp_path, *[conversation(f"q{i}", f"a{i}") for i in range(10)]), tokenizer)
    assert (data.train.n_documents, data.validation.n_documents) == (7, 3)
    assert shown(tokenizer, data.train.values).count("assistant:a") == 7


def test_the_cache_knows_the_template(tmp_path, tokenizer):
    path = write(tmp_path, conversation("hi", "yo"), conversation("a", "b"))
    first = made(path, tokenizer)
    assert np.array_equal(made(path, tokenizer).train.counted, first.train.counted)
    (tmp_path / "other").mkdir()
    tokenizer.save(tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text(TEMPLATE.replace(":", ">"))
    other = made(path, Tokenizer.load(tmp_path / "other"))
    assert ">" in shown(tokenizer, other.train.values)
    file = DataConfig(
        source=ConversationsConfig(path=str(path)), tokenizer=TokenizerFileConfig(path=str(tmp_path / "other")),
        validation=0.3,
    )  # fmt: skip
    assert np.array_equal(prepare(file).train.values, other.train.values)


def test_long_conversations_are_cut_and_counted(tmp_path, tokenizer):
    """Every target stays: none is dropped."""
    data = made(write(tmp_path, *[conversation("q", "a" * n) for n in (3, 60, 90, 100)]), tokenizer)
    batches = PackedBatches(data.train, context=50, batch_size=1, seed=0, shuffle=False)
    targets = sum(int((batches.batch(0, i).targets != IGNORE).sum()) for i in range(len(batches)))
    assert targets == int(np.asarray(data.train.counted).sum())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a"}, r"line 2: needs a list 'messages', or texts 'prompt' and 'response'; found text"),
        ({"messages": "a"}, r"line 2: needs a list 'messages'"),
        ({"prompt": "a", "response": 3}, r"line 2: needs a list 'messages', or texts"),
        (conversation("a"), r"line 2: the assistant says nothing, so there is nothing to learn; add its answer"),
        (conversation("a", ""), r"line 2: the assistant says nothing"),
        (
            {"messages": [{"role": "robot", "content": "a"}]},
            r"line 2: message 0: needs a 'role' out of system, user, assis",
        ),
        ({"messages": [{"role": "user", "content": ["a"]}]}, r"message 0: .* a text 'content' and no other keys"),
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, r"message 0: .* no other keys but name"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, r"message 0: .*'from' and 'value' as in ShareGPT"),
        (conversation("a", "b") | {"tools": 3}, r"line 2: 'tools' must be a list of descriptions, found 3"),
        ([1], r"line 2: needs an object, found list"),
    ],
)
def test_lines_that_are_no_conversation(tmp_path, tokenizer, line, message):
    with pytest.raises(FileError, match=message):
        made(write(tmp_path, conversation("a", "b"), line), tokenizer)


def test_the_template_is_needed(tmp_path, tokenizer):
    path = write(tmp_path, conversation("hi", "yo"), conversation("a", "b"))
    with pytest.raises(ConfigError, match=r"the model has no chat template; take a model made for chat"):
        made(path, BPETokenizerConfig(vocab_size=257).train(["abc"]))
    with pytest.raises(ConfigError, match=r"the source Conversations is text, but there is no tokenizer"):
        prepare(DataConfig(source=ConversationsConfig(path=str(path))))
    with pytest.raises(
        ConfigError, match=r"needs a tokenizer with a chat template, and BPETokenizer makes one without"
    ):
        DataConfig(source=ConversationsConfig(path="x"), tokenizer=BPETokenizerConfig(vocab_size=300))
