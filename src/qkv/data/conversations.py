"""Conversations to learn from: the assistant's turns are what a model learns to write, all else is what it reads."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, final

import numpy as np

from qkv.config import config
from qkv.data.chat import ChatTemplate
from qkv.data.sources import Holds, SourceConfig, files_below, json_records
from qkv.data.tokenizer import Tokenizer
from qkv.errors import ConfigError, FileError

ROLES = ("system", "user", "assistant")


@final
class Example(NamedTuple):
    """One conversation of a corpus.

    Attributes:
        messages: Each with `role` and `content`, from the first to the last.
        where: The file and line that it stands in, for errors.
    """

    messages: tuple[dict[str, str], ...]
    where: str

    def tobytes(self) -> bytes:
        """Equal for equal conversations, wherever they stand."""
        return json.dumps(self.messages).encode()


@final
@config
class ConversationsConfig(SourceConfig):
    """Conversations in JSON Lines: a .jsonl file, or all below a folder, sorted by path. A line is one conversation.

    A line is an object with `messages`, a list of `{"role": …, "content": …}` with the roles system, user and
    assistant; or with `prompt` and `response`, for a question and its answer. Other keys beside these are not read.

    Attributes:
        path: The file or folder.
    """

    holds: ClassVar[Holds] = "conversations"

    path: str

    def documents(self) -> Iterator[Example]:
        """The conversations.

        Raises:
            FileError: A line is no conversation, or the assistant says nothing in it; the message names the line.
        """
        for path in files_below(Path(self.path), (".jsonl",)):
            for record, where in json_records(path):
                yield Example(_messages(record, where), where)


class EncodedExample(NamedTuple):
    """A conversation as a model reads it.

    Attributes:
        ids: Of the whole text.
        counted: For each id whether the model learns to write it.
        n_bytes: UTF-8 bytes of what it learns to write.
    """

    ids: list[int]
    counted: np.ndarray
    n_bytes: int


def encode_example(tokenizer: Tokenizer, template: ChatTemplate, example: Example) -> EncodedExample:
    """The text of the model's own chat template; counted are the assistant's turns with what ends them.

    Raises:
        ConfigError: The template does not take such messages, or does not show which text is the assistant's.
    """
    try:
        text, spans = template.render_with_spans(example.messages)
        encoded = tokenizer.encode_rendered(text)
    except ConfigError as error:
        raise ConfigError(f"{example.where}: {error}") from None
    counted = np.array(encoded.inside(spans), dtype=np.bool_)
    return EncodedExample(encoded.ids, counted, sum(len(text[a:b].encode("utf-8")) for a, b in spans))


def _messages(record: dict[str, Any], where: str) -> tuple[dict[str, str], ...]:
    match record:
        case {"messages": list(messages)}:
            made = tuple(_message(message, f"{where}: message {i}") for i, message in enumerate(messages))
        case {"prompt": str(prompt), "response": str(response)}:
            made = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
        case _:
            found = ", ".join(sorted(record)[:10]) or "nothing"
            raise FileError(f"{where}: needs a list 'messages', or texts 'prompt' and 'response'; found {found}")
    if not any(message["role"] == "assistant" and message["content"] for message in made):
        raise FileError(f"{where}: the assistant says nothing, so there is nothing to learn; add its answer")
    return made


def _message(message: Any, where: str) -> dict[str, str]:
    match message:
        case {"role": str(role), "content": str(content)} if role in ROLES and len(message) == 2:
            return {"role": role, "content": content}
    raise FileError(
        f"{where}: needs a 'role' out of {', '.join(ROLES)}, a text 'content' and no other keys, found {message!r:.80}"
    )
