"""Chat templates: the same text as transformers writes, sources that stay true, and nothing a stranger can do."""

import contextlib
import json
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

import chat_templates as templates
from qkv.data import ChatTemplate, Rendered
from qkv.data.rendered import SEVERAL, join, mark
from qkv.data.sandbox import MAX_SOURCE
from qkv.errors import ConfigError, FileError

TALK = [
    {"role": "user", "content": " Hi there, aXb \n"},
    {"role": "assistant", "content": " <think>\nhm\n</think>\n\nHello! "},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "c\n"},
]
SYSTEM = {"role": "system", "content": " Be brief. "}
CALL = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "é<", "b": [1, None, True]}}}]},
    {"role": "ipython", "content": {"result": [1, "x"]}},
]
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " q "}]}]


def template(source):
    return ChatTemplate(source, bos="<s>", eos="</s>")


def by_transformers(source, messages, prompt):
    values = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": prompt}
    return render_jinja_template(conversations=[messages], chat_template=source, **values)[0][0]


# --- the same text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize(
    ("name", "messages"),
    [(name, messages) for name in templates.ALL for messages in (TALK, TALK[:1], TALK[:3])]
    + [(name, [SYSTEM, *TALK]) for name in templates.ALL if name != "gemma"]
    + [("llama", CALL), ("gemma", PARTS), ("operations", TALK), ("operations", [SYSTEM, *TALK])],
)
def test_the_text_is_that_of_transformers(name, messages, prompt):
    source = {**templates.ALL, "operations": templates.OPERATIONS}[name]
    text = template(source).render(messages, add_generation_prompt=prompt)
    assert text == by_transformers(source, messages, prompt)
    assert len(text) > 10


@given(st.lists(st.text(), min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_whatever_is_said_the_text_is_that_of_transformers(contents):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    for source in (templates.CHATML, templates.LLAMA, templates.MISTRAL, templates.THINKING):
        assert template(source).render(messages, add_generation_prompt=True) == by_transformers(source, messages, True)


def test_what_a_template_says_no_to():
    with pytest.raises(ConfigError, match="the chat template does not take these messages: System role not supported"):
        template(templates.GEMMA).render([SYSTEM, *TALK], add_generation_prompt=True)


@pytest.mark.parametrize("role", [None, "", 3, "user<|im_end|>", "a" * 65, "user\n"])
def test_a_role_is_a_word(role):
    with pytest.raises(ConfigError, match="message 1 has the role"):
        template(templates.CHATML).render([TALK[0], {"role": role, "content": "x"}], add_generation_prompt=True)


def test_a_message_holds_plain_data():
    with pytest.raises(ConfigError, match="message 0 holds a object; give text, numbers, lists and dictionaries"):
        template(templates.CHATML).render([{"role": "user", "content": [object()]}], add_generation_prompt=True)


# --- sources ----------------------------------------------------------------------------------------------------------


def origin(text):
    """What came out of each message."""
    return {(source, text[start:end]) for start, end, source in text.runs}


def test_a_text_knows_what_came_out_of_a_message():
    text = template(templates.LLAMA).render([SYSTEM, *TALK[:1]], add_generation_prompt=True)
    assert origin(text) == {(0, "Be brief."), (1, "Hi there, aXb")}
    assert "Be brief." not in text.own()
    assert text.own().count("<|eot_id|>") == 2


def test_what_thinking_leaves_of_an_answer():
    text = template(templates.THINKING).render(TALK, add_generation_prompt=False)
    assert (1, "Hello! ") in origin(text)
    assert "hm" not in text


@pytest.mark.parametrize(
    ("expression", "want"),
    [
        ("'<' + m + '>'", {(0, "ab ba")}),
        ("m ~ 1 ~ m", {(0, "ab ba")}),
        ("('<' + m)[1:3]", {(0, "ab")}),
        ("('x' + m + 'x')[::-1]", {(0, "xab bax")}),
        ("(' ' + m + ' ') | trim", {(0, "ab ba")}),
        ("('xx' + m).lstrip('xa')", {(0, "b ba")}),
        ("(m + '|x').split('|') | join(',')", {(0, "ab ba")}),
        ("('|' + m + '|').replace('|', '')", {(0, "ab ba")}),
        ("'-x-'.replace('x', m)", {(0, "ab ba")}),
        ("('<' + m).upper()", {(0, "AB BA")}),
        ("('<' + m).removeprefix('<a')", {(0, "b ba")}),
        ("[m, 'x'] | tojson", {(0, '["ab ba", "x"]')}),
        ("'%s!' % m", {(0, "ab ba!")}),
        ("m.split() | join('-')", {(0, "ab"), (0, "ba")}),
        ("m * 2", {(0, "ab baab ba")}),
        ("[m] | string", {(0, "['ab ba']")}),
        ("m | replace('a', 'x')", {(0, "b b")}),
        ("(m ~ messages[1].content) | tojson", {(SEVERAL, '"ab bacd"')}),
        ("m | first ~ '<'", {(0, "a")}),
        ("m | list | last", {(0, "a")}),
        ("messages[0] | items | list | last | last", {(0, "ab ba")}),
        ("m | indent(2, true)", {(0, "  ab ba")}),
        ("messages | map(attribute='content') | list | first", {(0, "ab ba")}),
        ("messages[0].role", set()),
    ],
)
def test_operations_keep_the_source(expression, want):
    messages = [{"role": "user", "content": "ab ba"}, {"role": "user", "content": "cd"}]
    source = "{% set m = messages[0].content %}{{ " + expression + " }}"
    assert origin(template(source).render(messages, add_generation_prompt=False)) == want


def test_blocks_macros_and_loops_keep_the_source():
    source = (
        "{% macro w(x) %}<{{ x }}>{% endmacro %}{% set b %}[{{ w(messages[0].content) }}]{% endset %}{{ b }}"
        "{% for c in b %}{{ c }}{% endfor %}{% filter trim %} {{ b }} {% endfilter %}"
    )
    text = template(source).render([{"role": "user", "content": "yo"}], add_generation_prompt=False)
    assert text == "[<yo>]" * 3
    assert text.own() == "[<\0\0>]" * 3


PIECES = st.lists(st.tuples(st.text("ab ", max_size=4), st.sampled_from([None, 0, 1])), max_size=5)


@given(PIECES, st.integers(-9, 9), st.integers(-9, 9))
@example([("ab", 0), ("a", None)], 0, 3)
def test_a_cut_is_a_cut_of_the_sources(pieces, start, stop):
    sources = [source for text, source in pieces for _ in text]
    whole = join([text if source is None else mark(text, source) for text, source in pieces])
    cut = Rendered(whole, getattr(whole, "runs", ()))[start:stop]
    assert isinstance(cut, Rendered)
    found = [None] * len(cut)
    for a, b, source in cut.runs:
        assert a < b
        found[a:b] = [source] * (b - a)
    assert (cut, found) == (str(whole)[start:stop], sources[start:stop])


# --- what the assistant wrote -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("chatml", [" <think>\nhm\n</think>\n\nHello! <|im_end|>", "c\n<|im_end|>"]),
        ("llama", ["<think>\nhm\n</think>\n\nHello!<|eot_id|>", "c<|eot_id|>"]),
        ("gemma", ["<think>\nhm\n</think>\n\nHello!<end_of_turn>", "c<end_of_turn>"]),
        ("mistral", [" <think>\nhm\n</think>\n\nHello!</s>", " c</s>"]),
        ("thinking", ["Hello! <|im_end|>", "c\n<|im_end|>"]),
        ("marked", [" <think>\nhm\n</think>\n\nHello! <|im_end|>", "c\n<|im_end|>"]),
    ],
)
def test_the_assistants_own_text(name, want):
    text, spans = template(templates.ALL[name]).render_with_spans(TALK)
    assert [text[start:end] for start, end in spans] == want
    assert template(templates.ALL[name]).end_of_turn() == want[1].strip().removeprefix("c").strip()


CALLS = [
    {"role": "user", "content": "Weather?", "name": "Ann"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "Rain.", "tool_call_id": "1"},
    {"role": "assistant", "content": "It rains."},
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "messages", "want"),
    [
        ("qwen3", TALK, ["Hello! <|im_end|>", "<think>\n\n</think>\n\nc\n<|im_end|>"]),
        ("qwen3", [SYSTEM, *TALK[:2]], ["<think>\nhm\n</think>\n\nHello! <|im_end|>"]),
        ("qwen3", CALLS, ['<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>',
                          "<think>\n\n</think>\n\nIt rains.<|im_end|>"]),
        ("phi3", TALK, [" <think>\nhm\n</think>\n\nHello! <|end|>", "c\n<|end|>\n</s>"]),
        ("deepseek", TALK, ["\n\nHello! <｜end▁of▁sentence｜>", "c\n<｜end▁of▁sentence｜>"]),
        ("deepseek", [SYSTEM, *TALK], ["\n\nHello! <｜end▁of▁sentence｜>", "c\n<｜end▁of▁sentence｜>"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tools", [None, [{"name": "f<|im_end|>", "parameters": {}}]])
def test_templates_that_write_an_earlier_answer_otherwise(name, messages, want, tools):
    """A template may write the end of a text, or a last answer, in another way than it does in the middle."""
    source = templates.MORE[name]
    text, spans = template(source).render_with_spans(messages, tools)
    values = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": False}
    assert text == render_jinja_template(conversations=[messages], tools=tools, chat_template=source, **values)[0][0]
    assert [text[start:end] for start, end in spans] == want
    assert "f<|im_end|>" not in text.own()


@given(st.lists(st.text("ab <|im_end|>\n", min_size=1).filter(str.strip), min_size=2, max_size=9))
@settings(deadline=None, max_examples=60)
def test_whatever_is_said_the_spans_hold_the_answers_and_nothing_of_the_questions(contents):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    for source in (*templates.MORE.values(), templates.CHATML, templates.LLAMA, templates.GEMMA, templates.MISTRAL):
        text, spans = template(source).render_with_spans(messages)
        said = [place for start, end in spans for a, b, place in text.runs if start <= a and b <= end]
        assert said == [run[2] for run in text.runs if run[2] % 2]
        assert all(start >= b or end <= a for start, end in spans for a, b, place in text.runs if place % 2 == 0)
        assert all(text[start:end].rstrip().endswith((">", "]")) for start, end in spans)


PARTS_ONLY = (
    "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}<|end|>{% endfor %}"
)


def test_a_message_of_which_nothing_is_written_is_refused():
    """A template that wants parts writes nothing of a text."""
    message = r"writes nothing of message 0 \(user: 'q'\); give its content as the template wants it"
    plain = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ConfigError, match=message):
        template(PARTS_ONLY).render_with_spans(plain)
    with pytest.raises(ConfigError, match=message):
        template(PARTS_ONLY).prompt(plain[:1])
    with pytest.raises(ConfigError, match="does not show which of its text is the assistant's in message 1"):
        template("{{ messages[0].content }}").render_with_spans(plain)
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in plain]
    text, spans = template(PARTS_ONLY).render_with_spans(parts)
    assert [text[start:end] for start, end in spans] == ["<|assistant|>a<|end|>"]


def test_marks_are_those_of_transformers():
    _, spans = template(templates.MARKED).render_with_spans(TALK)
    _, want = render_jinja_template(
        conversations=[TALK], chat_template=templates.MARKED, return_assistant_tokens_mask=True
    )
    assert spans == want[0]


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",  # nothing ends a turn
        "{% for m in messages | reverse %}{{ m.role }}: {{ m.content }};{% endfor %}",
        "{% for m in messages %}{{ m.content }};{% endfor %}{{ messages[1].content }};",  # said twice
        "{% for m in messages %}{{ m.content }}{{ messages[0].content }};{% endfor %}",  # the question in the answer
    ],
)
def test_where_it_is_not_certain_it_is_an_error(source):
    with pytest.raises(ConfigError, match=r"does not show which of its text is the assistant's in message 1; put"):
        template(source).render_with_spans(TALK)


# --- hostile templates ------------------------------------------------------------------------------------------------

NS = "{% set ns = namespace(x=messages[0].content ~ 'x') %}{% for i in range(99) %}"
HOSTILE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attr": "{{ messages | attr('__class__') }}",
    "item": "{{ messages['__class__']['__init__'] }}",
    "format": "{{ '{0.__class__.__init__}'.format(messages) }}",
    "globals": "{{ raise_exception.__globals__.os }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "namespace": "{% set n = namespace() %}{% set n.__class__ = 3 %}{{ n.__class__.x }}",
    "self": "{{ self._TemplateReference__context }}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update({'content': 'x'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'x' as y %}",
    "from": "{% from 'x' import y %}",
    "extends": "{% extends 'x' %}",
    "block": "{% block a %}{% endblock %}",
    "autoescape": "{% autoescape true %}{% endautoescape %}",
    "range": "{{ range(10 ** 9) | list }}",
    "ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "strings": "{% for a in 'ab' * 50 %}" * 5 + "x" + "{% endfor %}" * 5,
    "filtered": "{% for a in range(99999) if false %}{% endfor %}" * 9,
    "repeat": "{{ 'a' * 10 ** 9 }}",
    "repeat list": "{{ [1] * 10 ** 9 }}",
    "long text": "{% for i in range(99999) %}" + "long" * 999 + "{% endfor %}",
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(30) }}",
    "recursive": "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "power": "{{ 2 ** (10 ** 9) }}",
    "powers": "{{ ((9 ** 999) ** 999) ** 999 }}",
    "doubling": NS + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling +": NS + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling block": NS + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "doubling replace": NS + "{% set ns.x = ns.x.replace('x', 'xx') %}{% endfor %}",
    "doubling join": NS + "{% set ns.x = ns.x.join('abc') %}{% endfor %}",
    "shared": NS + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "shared *": NS + "{% set ns.x = [ns.x] * 2 %}{% endfor %}{{ ns.x == ns.x }}",
    "shared dict": NS + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
    "shared (,)": NS + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ ns.x in [ns.x] }}",
    "shared dict()": NS + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x | string }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width *": "{{ '%*d' % (10 ** 9, 1) }}",
    "date": "{{ strftime_now('%1000000000d') }}",
    "center": "{{ 'x'.center(10 ** 9) }}",
    "indent": "{{ 'x' | indent(10 ** 9) }}",
    "json": "{{ messages | tojson(indent=10 ** 9) }}",
    "jsons": "{% for i in range(99999) %}{{ messages | tojson }}{% endfor %}",
    "search": "{% for i in range(9999) %}{{ ('a' * 29000).find('a' * 50 ~ 'b') }}{% endfor %}",
    "compare": "{% set x = 'a' * 99999 %}{% set y = 'a' * 99999 %}{% for i in range(999) %}{{ x == y }}{% endfor %}",
    "lipsum": "{{ lipsum(10 ** 6) }}",
    "call": "{% call messages() %}{% endcall %}",
    "charge": "{{ (-10 ** 9) | charged }}",
    "nesting": "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
    "sum": "{{ 1" + " + 1" * 2000 + " }}",
    "blocks": "{% for a in 'ab' %}" * 25 + "{% endfor %}" * 25,
    "digits": "{{ " + "9" * 60000 + " }}",
    "to_bytes": "{{ (1).to_bytes(10 ** 9, 'big') }}",
    "center as an item": "{{ 'x'['center'](10 ** 9) }}",
    "varargs": "{% macro m() %}{{ varargs == varargs or m(varargs, varargs) }}{% endmacro %}{{ m(1) }}",
    "namespaces": NS + "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "namespaces is": NS + "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x is upper or f() }}",
    "backwards": "{% set x = 'a' * 500000 %}{{ x.rfind('b' ~ x) }}",
    "strip": "{% set x = 'a' * 500000 %}{{ x.strip('b' * 500000 ~ 'a') }}",
    "branches": "{% for i in range(99999) %}{% for j in range(99999) %}"
    + "{% if a %}{% endif %}" * 2000
    + "{% endfor %}{% endfor %}",
    "unfinished": "{% if",
    "unknown": "{{ x | no_such_filter }}",
    "words": "{{ a }}" * (4096),
    "length": "a" * (MAX_SOURCE + 1),
    "bodies": "{% for i in range(99999) %}" + "{{ a }}" * (2048) + "{% endfor %}",
}


HARMLESS = {"self", "compare", "words", "block", "date", "varargs"}
"""These do nothing and end soon enough."""

JUDGE = """
import json, resource, sys, time
from qkv.data import ChatTemplate
from qkv.errors import FileError
hostile, talk = json.load(sys.stdin)
result = {}
for name, source in hostile.items():
    held, start, error = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), None
    try:
        ChatTemplate(source).render(talk, add_generation_prompt=True)
    except FileError as refused:
        error = str(refused)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
    result[name] = (error, time.process_time() - start, grown / 1024)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def verdicts():
    """What became of each, in a process without the checks of types that take longest in these tests."""
    command = [sys.executable, "-c", JUDGE]
    given = json.dumps([HOSTILE, TALK])
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True, timeout=200)
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_soon_comes_to_an_end(name, verdicts):
    error, seconds, megabytes = verdicts[name]
    assert (error is None) == (name in HARMLESS)
    assert error is None or error.startswith(
        ("the chat template cannot be used: ", "the chat template takes more time or memory")
    )
    assert "\n" not in (error or "")
    assert seconds < 3
    assert megabytes < 200


@pytest.mark.parametrize(
    "expression",
    ["''.__class__", "messages.__len__", "messages[0].__class__", "none.__class__", "range.__self__",
     "x.__class__ is defined", "''.join.__self__", "namespace(a=1).__class__", "(1).__class__",
     "loop.__class__ is defined",
     "''['__class__']"],
)  # fmt: skip
def test_nothing_of_python_is_reachable(expression):
    source = "{% set y = " + expression + " %}{{ y }}"
    with contextlib.suppress(FileError):
        assert template(source).render(TALK, add_generation_prompt=True) in ("", "False")


def test_a_template_cannot_change_the_messages():
    messages = [{"role": "user", "content": ["a"]}]
    with pytest.raises(FileError, match="access to attribute 'append'"):
        template("{{ messages[0].content.append('b') }}").render(messages, add_generation_prompt=True)
    assert messages == [{"role": "user", "content": ["a"]}]


def test_long_conversations_are_no_attack():
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 300} for i in range(600)]
    for source in templates.ALL.values():
        assert len(template(source).render(messages, add_generation_prompt=True)) > 10_000
    long = [{"role": "user", "content": "x" * 3_000_000}]
    assert len(template(templates.LLAMA).render(long, add_generation_prompt=True)) > 3_000_000


def test_limits_are_of_one_rendering_and_one_thread():
    from concurrent.futures import ThreadPoolExecutor

    one = template(templates.LLAMA)
    want = one.render(TALK, add_generation_prompt=True)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: one.render(TALK, add_generation_prompt=True), range(60))) == {want}
