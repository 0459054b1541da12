"""Corpora: sources, tokenizers, prepared datasets and batches."""

from qkv.data.batches import IGNORE, Batch, Batches
from qkv.data.dataset import DataConfig, Dataset, Split, prepare
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
    TextStream,
    Tokenizer,
    TokenizerConfig,
    TokenizerFileConfig,
)

__all__ = [
    "END_OF_TEXT",
    "IGNORE",
    "SHAKESPEARE",
    "BPETokenizerConfig",
    "Batch",
    "Batches",
    "CharacterTokenizerConfig",
    "DataConfig",
    "Dataset",
    "FilesConfig",
    "PackageConfig",
    "SourceConfig",
    "Split",
    "TextSourceConfig",
    "TextStream",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerFileConfig",
    "VectorFilesConfig",
    "prepare",
]
