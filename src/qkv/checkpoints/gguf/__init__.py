"""GGUF, the file format of llama.cpp, in and out."""

from qkv.checkpoints.gguf.blocks import expand, int4_groups, quantise
from qkv.checkpoints.gguf.kinds import KINDS, GGUFTensor
from qkv.checkpoints.gguf.load import Opened, load_gguf, open_gguf
from qkv.checkpoints.gguf.names import HuggingFace, family_for_gguf, from_huggingface, to_huggingface
from qkv.checkpoints.gguf.reader import GGUF, read_gguf
from qkv.checkpoints.gguf.writer import encode, file_type, write_gguf
