"""Models with packed weights."""

from torch import nn

from qkv.errors import ConfigError
from qkv.nn.embedders import TokenEmbedder
from qkv.nn.heads import LMHead
from qkv.nn.quantised import HalfLinear, Width, quantised
from qkv.shapes import Float, Tensor


def quantise(model: nn.Module, width: Width) -> None:
    """Pack the weights of a model in place: its linear maps to `width`, tables of tokens and heads to float16.

    All else becomes float32, and so does the stream. Nothing can be trained any more.

    Raises:
        ConfigError: As for `quantised`; the message names the layer.
    """
    model.float().requires_grad_(requires_grad=False)
    for path, part in list(model.named_modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                try:
                    setattr(part, name, quantised(child.weight, child.bias, width))
                except ConfigError as error:
                    raise ConfigError(f"{path}.{name}: {error}") from None
        if isinstance(part, TokenEmbedder | LMHead) and isinstance(part.weight, nn.Parameter):
            pack_table(part, part.weight)


def pack_table(part: TokenEmbedder | LMHead, weight: Float[Tensor, "V D"]) -> None:
    """Give an embedder or an untied head its table in float16."""
    del part.weight
    part.weight = HalfLinear(weight)
