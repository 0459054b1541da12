"""Chat templates: a conversation to the text that a model was trained on.

A template is a program in Jinja that comes with a model. `qkv.data.sandbox` runs it.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final, final

from qkv.data.rendered import Rendered, mark
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

    Time and memory are bounded: whatever the template, rendering a few messages ends within a few seconds. Long
    conversations may take longer, in proportion.

    Attributes:
        source: The template, in Jinja.
        bos: What it calls `bos_token`: the text of the token that begins a document; may be empty.
        eos: What it calls `eos_token`.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "") -> None:
        self.source, self.bos, self.eos = source, bos, eos

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Rendered:
        """The text of a conversation.

        Args:
            messages: From the first to the last.
            add_generation_prompt: Also write what comes before an answer of the assistant.

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
            "tools": None,
            "documents": None,
        }
        return self._compiled(values)

    def render_with_spans(self, messages: Sequence[Message]) -> tuple[Rendered, list[tuple[int, int]]]:
        """The text of a conversation, and where in it the assistant's own text stands: what a model learns to write.

        A span begins where the model would begin to write, and holds what ends the turn (`<|im_end|>`), but not the
        white space after it. It is what the template marks with `{% generation %}`, where it does. Otherwise it is
        found by rendering the conversation up to the message, and up to its end; the whole text must begin with both.

        Returns:
            The text, and the (start, end) of each of the assistant's messages, in characters.

        Raises:
            ConfigError: It cannot be determined for certain. Also as for `render`.
            FileError: As for `render`.
        """
        text = self.render(messages, add_generation_prompt=False)
        if _GENERATION.search(self.source):
            return text, [(start, end) for start, end in text.generated if start < end]
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._span(messages, place, text) for place in answers]

    def end_of_turn(self) -> str:
        """What the template writes after an answer, with which a model ends its turn. Empty: nothing, or not known."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        try:
            text = self.render([question, answer], add_generation_prompt=False)
        except ConfigError:
            return ""
        return text[_end(text, 1) :].strip()

    @cached_property
    def _compiled(self) -> Any:
        return compile_template(self.source)

    def _span(self, messages: Sequence[Message], place: int, text: Rendered) -> tuple[int, int]:
        try:
            before = self.render(messages[:place], add_generation_prompt=True)
            until = self.render(messages[: place + 1], add_generation_prompt=False)
        except (ConfigError, FileError):  # it takes whole conversations only
            before = until = Rendered("")
        start, end = len(before), len(until.rstrip())
        closed = bool(str.strip(until[max(start, _end(until, place)) :]))
        sources = {source for a, b, source in text.runs if a < end and b > start}
        outside = any(source == place and not start <= a <= b <= end for a, b, source in text.runs)
        same = until.startswith(before) and text.startswith(until[:end])
        if not (same and closed and sources <= {place} and not outside):
            raise ConfigError(
                f"the chat template does not show which of its text is the assistant's in message {place}; "
                "put {% generation %} … {% endgeneration %} around that text in the template"
            )
        return start, end


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
    return {key: value if key == "role" else mark(_plain(value, place), place) for key, value in message.items()}


def _plain(value: Any, place: int) -> Any:
    """A copy of JSON-like data, which a template can neither change nor look behind."""
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return str.__str__(value)
        case Mapping() if all(isinstance(key, str) for key in value):
            return {key: _plain(item, place) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, place) for item in value]
    raise ConfigError(f"message {place} holds a {type(value).__name__}; give text, numbers, lists and dictionaries")


def _end(text: Rendered, place: int) -> int:
    """Where the last of a message's own characters stands; 0: it has none."""
    return max((end for _, end, source in text.runs if source == place), default=0)
