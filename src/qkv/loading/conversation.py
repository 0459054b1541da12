"""A conversation with a model that goes on: history, what has been read already, and the end of the context."""

from collections.abc import Generator
from typing import Final, final

from qkv.data import Message
from qkv.errors import ConfigError
from qkv.generation import Finish, Kept, SamplingConfig
from qkv.loading.loaded import Loaded, Writing

_PART: Final = 4  # an answer shall have a quarter of the context, or what it may have at most if that is less


@final
class Conversation:
    """Questions and answers, one after the other. Keys and values are kept, so that each turn is read once.

    Where the context is full, the oldest questions are dropped with their answers; the system's message stays.

    Attributes:
        messages: All that was said and is still in the context.
        dropped: Messages that the last question made it drop.
        finish: Why the last answer ended; None: it was interrupted.
    """

    def __init__(
        self,
        loaded: Loaded,
        *,
        system: str | None = None,
        max_new_tokens: int = 1000,
        sampling: SamplingConfig | None = None,
    ) -> None:
        self.messages: list[Message] = []
        self.dropped = 0
        self.finish: Finish | None = None
        self._loaded, self._max_new_tokens, self._sampling = loaded, max_new_tokens, sampling
        self._kept = Kept()
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forget all that was said, and begin anew under this instruction."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    @property
    def system(self) -> str | None:
        """The instruction that it stands under."""
        first = self.messages[0] if self.messages else {}
        return first["content"] if first.get("role") == "system" else None

    def ask(self, question: str) -> Generator[str]:
        """The answer, piece by piece as it comes.

        When the iterator is closed before its end, what was written until then stays in the history; if that is
        nothing, the question was not asked.

        Raises:
            ConfigError: The question alone is longer than the context, or the model cannot chat. Nothing has changed.
            FileError: The chat template cannot be used.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        kept, ids = self._fit(messages)
        writing = self._loaded.answer(
            [ids], kept=self._kept, max_new_tokens=self._max_new_tokens, sampling=self._sampling
        )
        self.dropped = len(messages) - len(kept)
        self.messages = kept
        return self._answer(writing)

    def _answer(self, writing: Writing) -> Generator[str]:
        text, self.finish = "", None
        try:
            for piece in writing.single():
                text += piece
                yield piece
            self.finish = writing.finish[0]
        finally:
            said = self.finish is not None or text
            self.messages = [*self.messages, {"role": "assistant", "content": text}] if said else self.messages[:-1]

    def _fit(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
        """The messages that the context has room for, and their ids."""
        limit = self._loaded.config.limit
        ids = self._loaded.encode_chat(messages)
        if limit is None:
            return messages, ids
        room = min(self._max_new_tokens, limit // _PART)
        while len(ids) + room > limit and (shorter := _without_oldest(messages)):
            messages = shorter
            ids = self._loaded.encode_chat(messages)
        if len(ids) >= limit:
            raise ConfigError(
                f"the message takes {len(ids)} tokens, with what must stand around it, and the context of this model "
                f"has {limit}; write a shorter one"
            )
        return messages, ids


def _without_oldest(messages: list[Message]) -> list[Message]:
    """All but the oldest question and what follows it; nothing where there is only one."""
    questions = [place for place, message in enumerate(messages) if message["role"] == "user"]
    return [*messages[: questions[0]], *messages[questions[1] :]] if len(questions) > 1 else []
