"""Corpora: sources, tokenizers, prepared datasets and batches."""

from qkv.data.batches import IGNORE, Batch, Batches, PackedBatches
from qkv.data.chat import ChatTemplate, Message, template_of
from qkv.data.conversations import ConversationsConfig, Example
from qkv.data.dataset import Dataset, Split, prepare
from qkv.data.dates import DatesConfig
from qkv.data.emojis import EmojisConfig
from qkv.data.pairs import (
    PackagePairsConfig,
    PairBatches,
    PairSourceConfig,
    PairSplit,
    PairTokenizer,
    TSVConfig,
    encode_pairs,
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
from qkv.data.text_stream import TextStream
from qkv.data.tokenizer import END_OF_TEXT, Encoded, Tokenizer
from qkv.data.tokenizer_configs import (
    BPETokenizerConfig,
    CharacterTokenizerConfig,
    TokenizerConfig,
    TokenizerFileConfig,
    WordTokenizerConfig,
    unit_tokenizer,
    with_mask,
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
    "Dataset",
    "DatesConfig",
    "EmojisConfig",
    "Encoded",
    "Example",
    "FilesConfig",
    "Message",
    "PackageConfig",
    "PackagePairsConfig",
    "PackedBatches",
    "PairBatches",
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
    "encode_pairs",
    "prepare",
    "template_of",
    "unit_tokenizer",
    "with_mask",
]
