"""`DataConfig`: documents to go on from, whose source says whether they are texts, conversations or vectors."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Final, final

from qkv.config import config
from qkv.data import SourceConfig, TokenizerConfig, TokenizerFileConfig, VectorFilesConfig, prepare
from qkv.data.dataset import HeldOut, check_held_out
from qkv.errors import ConfigError
from qkv.loading.facts import Facts
from qkv.loading.loaded import Loaded
from qkv.loading.ready import tokenizer_in
from qkv.models.model import Model
from qkv.models.transformer import Transformer, TransformerConfig
from qkv.tasks.chat import Chat, read_conversations
from qkv.tasks.evaluation import Report
from qkv.tasks.next_token import NextToken
from qkv.tasks.task import Asked, Recipe, Start, TaskConfig
from qkv.tasks.text import Text, evaluate_text, read_texts
from qkv.tasks.vectors import Vectors, evaluate_vectors

_TASKS: Final = {"text": Text, "conversations": Chat, "vectors": Vectors}


@final
@config
class DataConfig(TaskConfig):
    """What to train on.

    Held out is `validation` of the corpus, always the same part. Of 100 documents or more, and of conversations: whole
    documents, those whose number has the lowest hash. Of fewer: the end of every document, for text from the start of a
    line if one is near.

    Attributes:
        source: The corpus.
        tokenizer: How text becomes ids; None for vectors, and where a recipe's `start` brings its own.
        validation: The share that is held out (0: nothing, and there is no evaluation), or the path of files like those
            of the source.
    """

    opens: ClassVar[type] = Loaded

    source: SourceConfig
    tokenizer: TokenizerConfig | None = None
    validation: HeldOut = 0.05

    def __post_init__(self) -> None:
        check_held_out(self.source, self.validation)
        tag = self.source.tag()
        if self.source.holds == "vectors" and self.tokenizer is not None:
            raise ConfigError(f"the source {tag} is vectors, which need no tokenizer; leave {self.tokenizer.tag()} out")
        if self.source.holds == "conversations" and not isinstance(self.tokenizer, TokenizerFileConfig | None):
            raise ConfigError(
                f"the source {tag} needs a tokenizer with a chat template, and {self.tokenizer.tag()} "
                "makes one without; leave it out and start from a model made for chat"
            )

    def check(self, recipe: Recipe) -> None:
        if recipe.sample is not None and self.source.holds == "vectors":
            raise ConfigError("sample writes text and the data are vectors; set sample to null")
        if recipe.model is not None and not isinstance(recipe.model, TransformerConfig):
            raise ConfigError(
                f"the data are {self.tag()} and model is {recipe.model.tag()}; give a Transformer, or other data"
            )
        if recipe.start is not None and self.tokenizer is not None:
            raise ConfigError("with start the tokenizer is the checkpoint's; leave data.tokenizer out")

    def notes(self) -> Iterable[str]:
        return self.source.notes()

    def prepare(self, start: Start | None = None) -> NextToken:
        if start is not None and not isinstance(start.opened, Loaded):
            raise ConfigError(f"start.path={start.path} is no language model; start from one, or give pairs as data")
        base = None if start is None else start.opened
        return _TASKS[self.source.holds](prepare(self, base and base.tokenizer), base)

    @classmethod
    def open(cls, folder: Path, model: Model) -> Loaded:
        assert isinstance(model, Transformer)
        return Loaded.of(model, tokenizer_in(folder), Facts.load(folder))

    @classmethod
    def evaluate(cls, opened: Any, asked: Asked) -> Report:
        asked.refuse("beams", "length_penalty", of="models of pairs")
        if asked.data is None:
            if asked.recipe is None or asked.conversations or asked.field:
                raise ConfigError("DATA is missing: give a text file, a folder of them, or a JSONL file")
            return super().evaluate(opened, asked)
        if opened.vocab_size is None:
            asked.refuse("conversations", "field", of="language models")
            return evaluate_vectors(opened, VectorFilesConfig(path=str(asked.data)).documents())
        if opened.tokenizer is None:
            raise ConfigError(
                f"{asked.path} has no tokenizer, so it cannot read text; evaluate it from Python with model.loss"
            )
        return evaluate_text(opened, (read_conversations if _are_conversations(asked) else read_texts)(opened, asked))


def _are_conversations(asked: Asked) -> bool:
    """Whether that is said, or DATA are of the kind of file that the run was trained on."""
    known = isinstance(asked.trained, DataConfig) and asked.trained.source.holds == "conversations"
    return asked.conversations or (known and asked.field is None and ".jsonl" in Path(str(asked.data)).suffixes)
