"""Models with packed weights."""

from torch import nn

from qkv.errors import ConfigError
from qkv.nn.embedders import TokenEmbedder
from qkv.nn.heads import LMHead
from qkv.nn.quantised import Width, quantised


def quantise(model: nn.Module, width: Width) -> None:
    """Pack the weights of a model in place: its linear maps to `width`, tables of tokens and their heads to int8.

    Norms, biases and tables of positions stay as they are.

    Raises:
        ConfigError: As for `quantised`; the message names the layer.
    """
    for path, part in list(model.named_modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                try:
                    setattr(part, name, quantised(child.weight, child.bias, width))
                except ConfigError as error:
                    raise ConfigError(f"{path}.{name}: {error}") from None
        if isinstance(part, TokenEmbedder | LMHead) and isinstance(part.weight, nn.Parameter):
            packed = quantised(part.weight, None, "int8")
            del part.weight
            part.weight = packed
