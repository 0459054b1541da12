"""Conversations: what is re-used, what is dropped, what stays."""

import dataclasses
from contextlib import closing

import pytest

import qkv
from chats import write_chat_run
from qkv import Conversation, SamplingConfig
from qkv.errors import ConfigError
from qkv.generation import Finish, Kept, generate
from qkv.models.transformer import Transformer

GREEDY = SamplingConfig(temperature=0)
QUESTIONS = ["Hello", "And then?", "é <|im_end|>", "Why"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return qkv.load(write_chat_run(tmp_path_factory.mktemp("chat") / "run"))


@pytest.fixture
def reads(monkeypatch):
    """How many tokens are read at each step."""
    lengths, encode = [], Transformer.encode

    def counted(self, inputs, *arguments, **options):
        lengths.append(inputs.shape[1])
        return encode(self, inputs, *arguments, **options)

    monkeypatch.setattr(Transformer, "encode", counted)
    return lengths


def ask(conversation, question):
    return "".join(conversation.ask(question))


def test_an_answer_is_what_the_model_writes_after_the_template(loaded):
    messages = [{"role": "user", "content": "Hello"}]
    ids = loaded.encode_chat(messages)
    assert ids[-1] == loaded.tokenizer.encode("\n")[0]
    steps = list(generate(loaded.model, [ids], max_new_tokens=20, sampling=GREEDY, stop_ids=[0, 258]))
    want = loaded.tokenizer.decode([step.ids[0] for step in steps if step.ids[0] is not None])
    assert loaded.chat(messages, max_new_tokens=20, sampling=GREEDY) == want
    assert "".join(loaded.stream_chat(messages, max_new_tokens=20, sampling=GREEDY)) == want


def test_what_ends_a_turn_ends_the_answer(loaded, monkeypatch):
    given = []

    def spy(*arguments, **options):
        given.append(options["stop_ids"])
        return generate(*arguments, **options)

    monkeypatch.setattr("qkv.loading.loaded.generate", spy)
    loaded.chat([{"role": "user", "content": "x"}], max_new_tokens=1)
    assert given == [(0, 258)]  # end of text, and <|im_end|>


def test_what_ends_a_turn_may_be_plain_text(loaded):
    template = qkv.ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }} ##\n{% endfor %}")
    plain = dataclasses.replace(loaded, template=template, facts=qkv.Facts())
    messages = [{"role": "user", "content": "x"}]
    writing = plain.answer([plain.encode_chat(messages)], max_new_tokens=5)
    assert writing._rows[0].stops._stops == ("##",)


def test_a_conversation_is_the_chat_of_its_messages(loaded):
    conversation = Conversation(loaded, system="Be kind.", max_new_tokens=12, sampling=GREEDY)
    messages = [{"role": "system", "content": "Be kind."}]
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = loaded.chat(messages, max_new_tokens=12, sampling=GREEDY)
        assert ask(conversation, question) == answer
        messages.append({"role": "assistant", "content": answer})
        assert conversation.messages == messages
        assert conversation.finish is not None
        assert conversation.dropped == 0


def test_each_turn_is_read_once(loaded, reads):
    conversation = Conversation(loaded, max_new_tokens=5, sampling=GREEDY)
    ask(conversation, "Hello " * 10)
    first = reads[0]
    del reads[:]
    ask(conversation, "Why")
    assert reads[0] < first
    assert reads[0] <= len("<>Why<>\n<>assistant\n") + 4 * 5 + 10
    assert set(reads[1:]) <= {1}


def test_what_was_kept_is_that_of_a_fresh_cache(loaded):
    kept, texts = Kept(), [[1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 3, 9, 9, 9, 9, 9, 9, 9], [7], [7], [7, 8]]

    def ids(text, kept):
        options = {"max_new_tokens": 6, "sampling": GREEDY, "kept": kept}
        return [step.ids[0] for step in generate(loaded.model, [text], **options)]

    for text in texts:
        assert ids(text, kept) == ids(text, None)
    with pytest.raises(ConfigError, match="a kept cache is of one text and there are 2 prompts"):
        generate(loaded.model, [[1], [2]], max_new_tokens=1, sampling=GREEDY, kept=kept)


def test_a_step_that_is_broken_off_leaves_nothing_behind(loaded, monkeypatch):
    kept = Kept()
    steps = generate(loaded.model, [[1, 2, 3]], max_new_tokens=9, sampling=GREEDY, kept=kept)
    next(steps)
    decoding = kept._decoding

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(loaded.model.blocks[1]), "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(steps)
    again = kept.start(loaded.model, [1, 2, 3, 4], 5, None)
    assert again is not decoding
    assert kept.start(loaded.model, [1, 2, 3, 5], 5, None) is again


def test_what_was_said_before_a_stop_stays(loaded):
    conversation = Conversation(loaded, max_new_tokens=50, sampling=GREEDY)
    whole = loaded.chat([{"role": "user", "content": "Hello"}], max_new_tokens=50, sampling=GREEDY)
    with closing(conversation.ask("Hello")) as pieces:
        part = next(pieces)
    assert whole.startswith(part)
    assert conversation.messages[-1] == {"role": "assistant", "content": part}
    assert conversation.finish is None
    nothing = Conversation(loaded, sampling=GREEDY)
    with closing(nothing.ask("Hello")) as pieces, pytest.raises(KeyboardInterrupt):
        pieces.throw(KeyboardInterrupt)
    ask(conversation, "And?")
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2


def test_the_oldest_turns_go_when_the_context_is_full(loaded):
    conversation = Conversation(loaded, system="S", max_new_tokens=40, sampling=GREEDY)
    dropped = 0
    for i in range(12):
        ask(conversation, f"{i}" + "x" * 60)
        dropped += conversation.dropped
        assert conversation.system == "S"
        assert conversation.messages[-2]["content"][0] == str(i)[0]
        assert conversation.messages[1]["role"] == "user"
    assert dropped >= 12
    assert dropped % 2 == 0
    assert len(conversation.messages) + dropped == 25
    before = list(conversation.messages)
    with pytest.raises(ConfigError, match=r"the message takes \d+ tokens.*the context of this model has 400"):
        conversation.ask("x" * 500)
    assert conversation.messages == before


def test_the_end_of_the_context_ends_an_answer(loaded):
    free = dataclasses.replace(loaded, facts=qkv.Facts(), template=qkv.ChatTemplate("{{ messages[0].content }}"))
    conversation = Conversation(free, sampling=GREEDY)
    ask(conversation, "x" * 290)
    assert conversation.finish is Finish.CONTEXT


def test_begin_forgets(loaded):
    conversation = Conversation(loaded, system="S", max_new_tokens=3, sampling=GREEDY)
    first = ask(conversation, "Hello")
    conversation.begin("S")
    assert conversation.messages == [{"role": "system", "content": "S"}]
    assert ask(conversation, "Hello") == first
    conversation.begin(None)
    assert (conversation.system, conversation.messages) == (None, [])


def test_a_model_that_cannot_chat(loaded):
    with pytest.raises(ConfigError, match="the model has no chat template and cannot chat; take one that was trained"):
        dataclasses.replace(loaded, template=None).chat([{"role": "user", "content": "x"}])
    with pytest.raises(ConfigError, match="the model has no tokenizer and cannot chat"):
        dataclasses.replace(loaded, tokenizer=None).chat([{"role": "user", "content": "x"}])


# --- several prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(seed=3)])
def test_each_of_several_prompts_is_as_it_is_alone(loaded, sampling):
    prompts = ["a", "", "a longer one, é", "a", "xyz" * 20]
    texts = loaded.generate(prompts, max_new_tokens=15, sampling=sampling)
    assert texts == [loaded.generate(prompt, max_new_tokens=15, sampling=sampling) for prompt in prompts]
    assert len(set(texts)) == 4
    assert loaded.generate([]) == []


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(seed=3)])
def test_several_prompts_and_conversations_come_piece_by_piece(loaded, sampling):
    prompts = ["a", "a longer one, é", "xyz" * 20]
    talks = [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": text} for text in prompts]]
    how = {"max_new_tokens": 15, "sampling": sampling}
    answers = [loaded.chat(talk, **how) for talk in talks]
    assert loaded.chat(talks, **how) == answers
    assert loaded.chat(["Hello"], **how) == answers[:1]
    for pieces, want in (
        (list(loaded.stream(prompts, **how)), loaded.generate(prompts, **how)),
        (list(loaded.stream_chat(talks, **how)), answers),
    ):
        assert ["".join(piece for row, piece in pieces if row == i) for i in range(len(want))] == want
        assert [row for row, _ in pieces] != sorted(row for row, _ in pieces)  # side by side
    assert list(loaded.stream([])) == []


def test_equal_prompts_without_a_seed_differ(loaded):
    assert len(set(loaded.generate(["a"] * 4, max_new_tokens=20))) == 4


def test_several_samples_are_of_one_prompt(loaded):
    with pytest.raises(ConfigError, match="n=2 samples of 3 prompts: give one prompt, or each of them 2 times"):
        loaded.generate(["a", "b", "c"], n=2)


def test_why_a_text_ended(loaded):
    stopless = dataclasses.replace(loaded, facts=qkv.Facts())
    whole = stopless.generate("a", max_new_tokens=20, sampling=GREEDY)
    done = stopless.complete(["a", "b" * 395], max_new_tokens=20, sampling=GREEDY)
    assert [one.finish for one in done] == [Finish.LENGTH, Finish.CONTEXT]
    (stopped,) = stopless.complete(["a"], max_new_tokens=20, sampling=GREEDY, stop=whole[3:6])
    assert (stopped.prompt, stopped.text, stopped.finish) == ("a", whole[: whole.index(whole[3:6])], Finish.STOP)
