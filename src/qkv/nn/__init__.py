"""Parts of models: sublayers, blocks, norms, positions, embedders and heads.

All of them are imported here: what is imported can be named in a file (`qkv.config`), also where nothing else uses it.
"""

from qkv.nn import attention, convolution, cross, ffn, latent, recurrent

__all__ = ["attention", "convolution", "cross", "ffn", "latent", "recurrent"]
