"""Corpora: sources, tokenizers, prepared datasets and batches."""

from qkv.data.batches import IGNORE, Batch, Batches
from qkv.data.chat import ChatTemplate, Message, template_of
from qkv.data.conversations import ConversationsConfig, Example
from qkv.data.dataset import DataConfig, Dataset, Split, prepare
from qkv.data.rendered import Rendered
from qkv.data.sources import (
    SHAKESPEARE,
    FilesConfig,
    PackageConfig,
    SourceConfig,
    TextSourceConfig,
    VectorFilesConfig,
)
from qkv.data.tokenizers import (
    END_OF_TEXT,
    BPETokenizerConfig,
    CharacterTokenizerConfig,
    Encoded,
    TextStream,
    Tokenizer,
    TokenizerConfig,
    TokenizerFileConfig,
    WordTokenizerConfig,
    unit_tokenizer,
)

__all__ = [
    "END_OF_TEXT",
    "IGNORE",
    "SHAKESPEARE",
    "BPETokenizerConfig",
    "Batch",
    "Batches",
    "CharacterTokenizerConfig",
    "ChatTemplate",
    "ConversationsConfig",
    "DataConfig",
    "Dataset",
    "Encoded",
    "Example",
    "FilesConfig",
    "Message",
    "PackageConfig",
    "Rendered",
    "SourceConfig",
    "Split",
    "TextSourceConfig",
    "TextStream",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerFileConfig",
    "VectorFilesConfig",
    "WordTokenizerConfig",
    "prepare",
    "template_of",
    "unit_tokenizer",
]
