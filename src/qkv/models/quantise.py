"""Models with packed weights."""

from torch import nn

from qkv.errors import ConfigError
from qkv.nn.part import Part
from qkv.nn.quantised import Width, quantised


def quantise(model: nn.Module, width: Width) -> None:
    """Pack the weights of a model in place: its linear maps to `width`, tables of tokens and heads to float16.

    All else becomes float32, and so does the stream. Nothing can be trained any more. A part says what it packs besides
    linear maps, and which of those stay wide.

    Raises:
        ConfigError: As for `quantised`, or a part cannot be packed; the message names the layer.
    """
    model.float().requires_grad_(requires_grad=False)
    parts = list(model.named_modules())
    wide = {id(weight) for _, part in parts if isinstance(part, Part) for weight in part.left_wide()}
    for path, part in parts:
        place = path
        try:
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear) and id(child.weight) not in wide:
                    place = f"{path}.{name}"
                    setattr(part, name, quantised(child.weight, child.bias, width))
            if isinstance(part, Part):
                place = path
                part.pack()
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
