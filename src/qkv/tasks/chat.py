"""Conversations: a model learns what the assistant says, and answers."""

from collections.abc import Iterator
from typing import final

import numpy as np

from qkv.data import ConversationsConfig, Split
from qkv.errors import ConfigError
from qkv.loading.loaded import Loaded
from qkv.models.model import Model
from qkv.tasks.task import Asked, Recipe, SampleConfig
from qkv.tasks.text import OfTokens


@final
class Chat(OfTokens):
    """See `DataConfig`."""

    def sample(self, model: Model, recipe: Recipe, settings: SampleConfig) -> str:
        """The prompt, and the answer."""
        question, sampling = {"role": "user", "content": settings.prompt}, settings.sampling(recipe.seed)
        answer = self.opened(model).chat([question], max_new_tokens=settings.tokens, sampling=sampling)
        return f"{settings.prompt}\n{answer}"

    def notes(self, recipe: Recipe) -> Iterator[str]:
        """Whether conversations are cut, so that an answer does not see its question."""
        lengths = np.diff(self.dataset.train.offsets) - 1
        if n_cut := int((lengths > recipe.context).sum()):
            yield (
                f"warning: {n_cut} of {len(lengths)} conversations are longer than context={recipe.context} and are "
                f"cut into pieces that do not see one another; the longest takes context={lengths.max()}"
            )

    def next_steps(self, folder: str) -> str:
        return f"qkv chat {folder}   ·   qkv eval {folder} FILE   ·   qkv show {folder}"


def read_conversations(opened: Loaded, asked: Asked) -> Split:
    """The conversations that an evaluation was asked for."""
    assert opened.tokenizer is not None
    if asked.field is not None:
        raise ConfigError("--field names the key of a text, and --conversations reads no texts; leave one out")
    conversations = ConversationsConfig(path=str(asked.data)).documents()
    return Split.from_conversations(opened.tokenizer, conversations, of=str(asked.data))
