"""Chat templates: a conversation to the text that a model was trained on.

A template is a program in Jinja that comes with a model. `qkv.data.sandbox` runs it.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final, final

from qkv.data.rendered import SEVERAL, TOOLS, Rendered, mark
from qkv.data.sandbox import compile_template
from qkv.data.tokenizer import Tokenizer
from qkv.errors import ConfigError, FileError

Message = Mapping[str, Any]

_ROLE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_GENERATION: Final = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@final
class ChatTemplate:
    """A conversation to text, in the words of one model.

    A message is a dictionary with a `role` (such as system, user, assistant) and a `content`; other keys, and contents
    that are lists of parts, reach the template as they are.

    The result is a `Rendered`: it knows which characters came out of a message. `Tokenizer.encode_rendered` reads
    special tokens in the template's own text only: nobody ends a turn by writing `<|im_end|>` into a message.

    Time and memory are bounded, in proportion to the length of the conversation.

    Attributes:
        source: The template, in Jinja.
        bos: What it calls `bos_token`: the text of the token that begins a document; may be empty.
        eos: What it calls `eos_token`.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "") -> None:
        self.source, self.bos, self.eos = source, bos, eos

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Any] | None = None
    ) -> Rendered:
        """The text of a conversation.

        Args:
            messages: From the first to the last.
            add_generation_prompt: Also write what comes before an answer of the assistant.
            tools: Descriptions of what the assistant may call.

        Raises:
            ConfigError: A message has no usable role, or the template says that it is not made for such messages.
            FileError: The template cannot be read, does what a template may not, or takes too long.
        """
        marked = [_marked(message, place) for place, message in enumerate(messages)]
        values = {
            "messages": marked,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos,
            "eos_token": self.eos,
            "tools": tools and mark(_plain(list(tools), "the list of tools"), TOOLS),
            "documents": None,
        }
        return self._compiled(values)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Rendered:
        """What a model reads before it answers. Errors as for `render`, and where a message is not written at all."""
        text = self.render(messages, add_generation_prompt=True, tools=tools)
        self._check_written(messages, text)
        return text

    @staticmethod
    def _check_written(messages: Sequence[Message], text: Rendered) -> None:
        written = {source for _, _, source in text.runs}
        for place, message in enumerate(messages):
            # Templates leave out what an earlier answer thought.
            if message["role"] != "assistant" and not written & {place, SEVERAL} and _says(message):
                raise ConfigError(
                    f"the chat template writes nothing of message {place} ({message['role']}: "
                    f"{message['content']!r:.40}); give its content as the template wants it, or leave the message out"
                )

    def render_with_spans(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> tuple[Rendered, list[tuple[int, int]]]:
        """The text of a conversation, and where in it the assistant's own text stands: what a model learns to write.

        A span begins where the model would begin to write, and holds what ends the turn (`<|im_end|>`), but not the
        white space after it. It is what the template marks with `{% generation %}`, where it does. Otherwise it is what
        came out of the message, with the template's text around it: after that which stands in front of an answer when
        the conversation ends there, and up to where texts that go on and texts that end begin to differ.

        Returns:
            The text, and the (start, end) of each of the assistant's messages, in characters.

        Raises:
            ConfigError: It cannot be determined for certain. Also as for `render`.
            FileError: As for `render`.
        """
        text = self.render(messages, add_generation_prompt=False, tools=tools)
        self._check_written(messages, text)
        if _GENERATION.search(self.source):
            return text, [(start, end) for start, end in text.generated if start < end]
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant" and _says(message)]
        return text, [self._span(messages, tools, place, text) for place in answers]

    def end_of_turn(self) -> str:
        """What the template writes after an answer, with which a model ends its turn. Empty: nothing, or not known."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        try:
            text = self.render([question, answer], add_generation_prompt=False)
        except ConfigError:
            return ""
        return _tail(text).strip()

    @cached_property
    def _compiled(self) -> Any:
        return compile_template(self.source)

    def _span(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, place: int, text: Rendered
    ) -> tuple[int, int]:
        own = [(start, end) for start, end, source in text.runs if source == place] or [(0, 0)]
        first, last = own[0][0], own[-1][1]
        others = [run for run in text.runs if run[2] != place]
        ordered = all(
            b <= first if TOOLS <= source < place else source > place and a >= last for a, b, source in others
        )
        try:  # what stands in front of this answer, and behind it, where the conversation ends there
            before = _tail(self.render(messages[:place], add_generation_prompt=True, tools=tools))
            after = _tail(self.render(messages[: place + 1], add_generation_prompt=False, tools=tools))
        except (ConfigError, FileError):  # it takes whole conversations only
            ordered, before, after = False, "", ""
        ahead = str(text[max((b for _, b, _ in others if b <= first), default=0) : first])
        behind = str(text[last : min((a for a, _, _ in others if a >= last), default=len(text))])
        header, closing = _common(before, ahead), _common(after, behind)
        if closing not in (after, behind):  # they part within a token
            closing = re.sub(r"[^\s>\])}]*$", "", closing)
        if not (ordered and last and header in (before, ahead) and closing.strip()):
            raise ConfigError(
                f"the chat template does not show which of its text is the assistant's in message {place}; "
                "put {% generation %} … {% endgeneration %} around that text in the template"
            )
        return first - len(ahead) + len(header), last + len(closing.rstrip())


def template_of(tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """The template that came with a tokenizer, if one did."""
    if tokenizer is None or tokenizer.chat_template is None:
        return None
    ids = (tokenizer.begin_of_text, tokenizer.end_of_text)
    bos, eos = ("" if token is None else tokenizer.name_of(token) for token in ids)
    return ChatTemplate(tokenizer.chat_template, bos=bos, eos=eos)


def _marked(message: Message, place: int) -> dict[str, Any]:
    """The message with its texts marked as its own; the role is a word of the program, not of a person."""
    role = message.get("role")
    if not (isinstance(role, str) and _ROLE.fullmatch(role)):
        raise ConfigError(
            f"message {place} has the role {role!r:.80}; give one such as 'system', 'user' or 'assistant'"
        )
    return {
        key: value if key == "role" else mark(_plain(value, f"message {place}"), place)
        for key, value in message.items()
    }


def _plain(value: Any, where: str) -> Any:
    """A copy of JSON-like data, which a template can neither change nor look behind."""
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return str.__str__(value)
        case Mapping() if all(isinstance(key, str) for key in value):
            return {key: _plain(item, where) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, where) for item in value]
    raise ConfigError(f"{where} holds a {type(value).__name__}; give text, numbers, lists and dictionaries")


def _tail(text: Rendered) -> str:
    """What the template writes behind the last character of a message."""
    return str.__getitem__(text, slice(max((end for _, end, _ in text.runs), default=0), None))


def _common(a: str, b: str) -> str:
    """What both begin with."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _says(message: Message) -> bool:
    """Whether there is anything in it that a template should write."""
    content = message.get("content")
    return bool(message.get("tool_calls") or (content.strip() if isinstance(content, str) else content))
