"""Corpora: sources, tokenizers, prepared datasets and batches."""

from qkv.data.batches import IGNORE, Batch, Batches
from qkv.data.chat import ChatTemplate, Message, template_of
from qkv.data.conversations import ConversationsConfig, Example
from qkv.data.dataset import DataConfig, Dataset, Split, prepare
from qkv.data.dates import DatesConfig
from qkv.data.pairs import (
    PackagePairsConfig,
    PairBatch,
    PairBatches,
    PairDataConfig,
    PairDataset,
    PairSourceConfig,
    PairSplit,
    PairTokenizer,
    TSVConfig,
    prepare_pairs,
)
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
    "DatesConfig",
    "Encoded",
    "Example",
    "FilesConfig",
    "Message",
    "PackageConfig",
    "PackagePairsConfig",
    "PairBatch",
    "PairBatches",
    "PairDataConfig",
    "PairDataset",
    "PairSourceConfig",
    "PairSplit",
    "PairTokenizer",
    "Rendered",
    "SourceConfig",
    "Split",
    "TSVConfig",
    "TextSourceConfig",
    "TextStream",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerFileConfig",
    "VectorFilesConfig",
    "WordTokenizerConfig",
    "prepare",
    "prepare_pairs",
    "template_of",
    "unit_tokenizer",
]
