"""Models: the Transformer, models of pairs, and initialisation. Imported as `qkv.nn` imports its parts."""

from qkv.models import encoder_decoder, seq2seq, transformer

__all__ = ["encoder_decoder", "seq2seq", "transformer"]
