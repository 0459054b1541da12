"""Embedders: raw input of one modality to the stream. One file each."""

from qkv.nn.embedders.embedder import Embedder, EmbedderConfig
from qkv.nn.embedders.patch import PatchEmbedder, PatchEmbedderConfig
from qkv.nn.embedders.token import TokenEmbedder, TokenEmbedderConfig
from qkv.nn.embedders.vector import VectorEmbedder, VectorEmbedderConfig
