"""Conversations to learn from: the assistant's turns are what a model learns to write, all else is what it reads."""

import json
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, final

import numpy as np

from qkv.config import config
from qkv.data.chat import ChatTemplate
from qkv.data.sources import Holds, SourceConfig, files_below, json_records
from qkv.data.tokenizer import Tokenizer
from qkv.errors import ConfigError, FileError

ROLES = ("system", "user", "assistant", "developer", "tool")
KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"})
SHARE_GPT = {"human": "user", "gpt": "assistant", "observation": "tool", **{role: role for role in ROLES}}
"""The role of each `from`."""


@final
class Example(NamedTuple):
    """One conversation of a corpus.

    Attributes:
        messages: Each with `role` and `content`, from the first to the last.
        where: The file and line that it stands in, for errors.
        tools: Descriptions of what the assistant may call.
    """

    messages: tuple[dict[str, Any], ...]
    where: str
    tools: list[Any] | None = None

    def tobytes(self) -> bytes:
        """Equal for equal conversations, wherever they stand."""
        return json.dumps([self.messages, self.tools]).encode()


@final
@config
class ConversationsConfig(SourceConfig):
    """Conversations in JSON Lines: a .jsonl file, or all below a folder, sorted by path. A line is one conversation.

    A line is an object with `messages`, a list of `{"role": …, "content": …}` with the roles system, developer, user,
    assistant and tool, and `name`, `tool_calls`, `tool_call_id` or `reasoning_content` where the template reads them;
    or with `conversations` as in ShareGPT (`{"from": "human", "value": …}`); or with `prompt` and `response`. `tools`
    describes what the assistant may call. Other keys beside these are not read.

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
        for path in files_below(self.path, (".jsonl",)):
            yield from (_conversation(record, where) for record, where in json_records(path))


def encode_example(tokenizer: Tokenizer, template: ChatTemplate, example: Example) -> tuple[list[int], np.ndarray, int]:
    """A conversation in the words of the model's own chat template.

    Returns:
        The ids, for each whether the model learns to write it (the assistant's turns with what ends them), and how many
        UTF-8 bytes these are.

    Raises:
        ConfigError: The template does not take such messages, or does not show which text is the assistant's.
    """
    try:
        text, spans = template.render_with_spans(example.messages, example.tools)
        encoded = tokenizer.encode_rendered(text)
    except ConfigError as error:
        raise ConfigError(f"{example.where}: {error}") from None
    counted = np.array(encoded.inside(spans), dtype=np.bool_)
    return encoded.ids, counted, sum(len(text[start:end].encode("utf-8")) for start, end in spans)


def _conversation(record: dict[str, Any], where: str) -> Example:
    match record:
        case {"messages": list(turns)} | {"conversations": list(turns)}:
            made = tuple(_message(turn, f"{where}: message {i}") for i, turn in enumerate(turns))
        case {"prompt": str(prompt), "response": str(response)}:
            made = ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
        case _:
            found = ", ".join(sorted(record)[:10]) or "nothing"
            raise FileError(f"{where}: needs a list 'messages', or texts 'prompt' and 'response'; found {found}")
    if not any(turn["role"] == "assistant" and (turn["content"] or "tool_calls" in turn) for turn in made):
        raise FileError(f"{where}: the assistant says nothing, so there is nothing to learn; add its answer")
    tools = record.get("tools") or None
    if not isinstance(tools, list | None):
        raise FileError(f"{where}: 'tools' must be a list of descriptions, found {tools!r:.80}")
    return Example(made, where, tools)


def _message(turn: Any, where: str) -> dict[str, Any]:
    match turn:
        case {"from": str(name), "value": str(content)} if name in SHARE_GPT and len(turn) == 2:
            return {"role": SHARE_GPT[name], "content": content}
        case {"role": str(role)} if role in ROLES and turn.keys() <= KEYS:
            content = turn.get("content")
            parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
            if isinstance(content, str) or parts or (content is None and turn.get("tool_calls")):
                return {"content": content} | turn
    raise FileError(
        f"{where}: needs a 'role' out of {', '.join(ROLES)}, a text 'content' and no other keys but "
        f"{', '.join(sorted(KEYS - {'role', 'content'}))}; or 'from' and 'value' as in ShareGPT; found {turn!r:.80}"
    )
