"""Linear maps whose weights stay packed: four bits in groups of 32, eight bits with a scale for each row, float16.

The products are PyTorch's own for CPUs and need no compiler. Where only weights are rounded, those of four and eight
bits take and give bfloat16 where there are few vectors, whatever type the stream has; that of a packed model is best
left in float32, which costs little.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, partial
from typing import ClassVar, Literal, TypeAlias, final
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn

from qkv.errors import ConfigError
from qkv.nn.part import Part
from qkv.ops import int4
from qkv.ops.int4 import GROUP
from qkv.shapes import Float, Int, Integer, Tensor

_MULTIPLE = 16
"""PyTorch's eight-bit product takes multiples of so many columns, unchecked."""

_WIDENED = 1 << 20
"""Bytes of weights in float32 at once: a core's own cache holds them."""

_TINY = 1e-30
"""Below any scale: a row of zeros has scale 0 and is divided by this."""

_MANY = 32
"""Vectors from which on the product of many is the faster one."""

_ROWS = 256
"""Vectors that are rounded and multiplied at once: their codes and sums stay in a core's own cache."""

_onednn = torch.ops.onednn

_laid_out: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
"""The weights of a `W8A8Linear` once more, as a fast product reads them: what can be neither copied nor saved."""

Width: TypeAlias = Literal["int8", "int4", "w8a8"]
"""Eight or four bits for weights alone; or eight for weights and for what they are multiplied with."""


class Packed(nn.Module, ABC):
    """Base of what stands in the place of an `nn.Linear`: x Wᵀ + b for a weight (N, K) that cannot be trained.

    Attributes:
        in_features: K.
        out_features: N.
        bias: (N,), or None.
    """

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @final
    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        """x Wᵀ + b, in the type of `x`.

        Raises:
            ConfigError: A gradient is asked for, or `x` is not on the CPU.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise ConfigError(
                "packed weights give no gradients; load the model with a dtype, such as float32, to train"
            )
        if x.device.type != "cpu":
            raise ConfigError(f"packed weights run on the CPU and x is on {x.device}; load the model with a dtype")
        y = self.product(x.reshape(-1, self.in_features))
        y = y.view(*x.shape[:-1], self.out_features).to(x.dtype)
        return y if self.bias is None else y.add_(self.bias)  # of its own memory

    @abstractmethod
    def product(self, x: Float[Tensor, "n K"]) -> Float[Tensor, "n N"]:
        """x Wᵀ, in any type."""


@final
class Int4Linear(Packed):
    """Four-bit weights: a weight is code · scale + zero, to the rounding of `qkv.ops.int4.pack`.

    Args:
        packed: Weights and scales, as `qkv.ops.int4.pack` or `pack_parts` made them.
        out_features: N.
        in_features: K.
        bias: Added to the product.
    """

    weight: Tensor
    scales: Tensor

    def __init__(
        self, packed: tuple[Tensor, Tensor], out_features: int, in_features: int, bias: Tensor | None = None
    ) -> None:
        super().__init__(out_features, in_features, bias)
        self.register_buffer("weight", packed[0])
        self.register_buffer("scales", packed[1])

    def product(self, x: Float[Tensor, "n K"]) -> Float[Tensor, "n N"]:
        y = int4.product(x, self.weight, self.scales)
        return y if y.shape[1] == self.out_features else y[:, : self.out_features]


class EightBits(Packed, ABC):
    """Base of the maps with eight-bit weights: a weight is code · scale, one scale a row.

    Args:
        codes: From -127 to 127.
        scale: One a row.
        bias: Added to the product.
    """

    weight: Tensor
    scale: Tensor
    scale_type: ClassVar[torch.dtype]

    def __init__(
        self, codes: Integer[Tensor, "N K"], scale: Float[Tensor, " N"], bias: Float[Tensor, " N"] | None = None
    ) -> None:
        super().__init__(codes.shape[0], codes.shape[1], bias)
        self.register_buffer("weight", F.pad(codes.to(torch.int8), (0, -codes.shape[1] % _MULTIPLE)))
        self.register_buffer("scale", scale.to(self.scale_type))


@final
class Int8Linear(EightBits):
    """Vectors in bfloat16, multiplied with the weights as they are widened."""

    scale_type = torch.bfloat16

    def product(self, x: Float[Tensor, "n K"]) -> Float[Tensor, "n N"]:
        x = F.pad(x.to(torch.bfloat16), (0, self.weight.shape[1] - self.in_features))
        return torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scale)


@final
class W8A8Linear(EightBits):
    """Vectors in eight bits as well, and whole numbers multiplied: code · scale, one scale a vector.

    The scale of a vector is found as it comes, so it gives the same whatever stands beside it (Dettmers et al. 2022,
    LLM.int8(), section 3.1; without its outliers in float16). For encoders, which read many vectors at once.
    """

    scale_type = torch.float32

    def product(self, x: Float[Tensor, "n K"]) -> Float[Tensor, "n N"]:
        out = x.new_empty(len(x), self.out_features, dtype=torch.float32)
        more, multiply = self.weight.shape[1] - self.in_features, self._multiply(len(x))
        for vectors, results in zip(x.float().split(_ROWS), out.split(_ROWS), strict=True):
            size = vectors.abs().amax(1, keepdim=True) / 127  # of a vector with a NaN it is NaN, and so is the result
            codes = (vectors / size.clamp(min=_TINY)).round_()
            torch.mul(multiply(F.pad(codes, (0, more)) if more else codes), size, out=results)
        return out

    def _multiply(self, n: int) -> Callable[[Tensor], Tensor]:
        """From codes to whole sums times the scale of the row, in float32. Both ways give the same."""
        if n < _MANY or not _has_packed_product():
            return lambda codes: torch.ops.aten._int_mm(codes.to(torch.int8), self.weight.T) * self.scale
        if self not in _laid_out:
            _laid_out[self] = _onednn.qlinear_prepack(self.weight, [_ROWS, self.weight.shape[1]])
        return partial(_packed_product, _laid_out[self], self.scale)


def _packed_product(packed: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """oneDNN's product, which takes codes from 0, of which 128 stands for 0: several times as fast as `_int_mm`."""
    shifted, zeros = codes.add_(128).to(torch.uint8), torch.zeros_like(scale, dtype=torch.int32)
    out = torch.float32
    return _onednn.qlinear_pointwise(shifted, 1.0, 128, packed, scale, zeros, None, 1.0, 0, out, "none", [], "")


@cache
def _has_packed_product() -> bool:
    """Whether it is there and exact: processors without instructions for it cut sums of two products to 16 bits."""
    codes, weight = torch.full((_MANY, 64), 127.0), torch.full((16, 64), 127, dtype=torch.int8)
    try:
        found = _packed_product(_onednn.qlinear_prepack(weight, [_MANY, 64]), torch.ones(16), codes)
    except (AttributeError, RuntimeError):
        return False
    return bool((found == 64 * 127**2).all())


@final
class HalfLinear(Packed):
    """Weights in float16: for what has no narrower product, and where bfloat16's eight bits are too few (logits).

    Args:
        weight: Rounded to float16.
        bias: Added to the product.
    """

    weight: Tensor

    def __init__(self, weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None) -> None:
        super().__init__(weight.shape[0], weight.shape[1], bias)
        self.register_buffer("weight", weight.detach().to(torch.float16))

    def product(self, x: Float[Tensor, "n K"]) -> Float[Tensor, "n N"]:
        """One vector in float16; for several, widened weights are faster, some rows at a time."""
        if len(x) == 1:
            size = x.abs().amax(-1, keepdim=True).clamp(min=_TINY)  # scaled to at most 1, no sum overflows
            return F.linear((x / size).to(torch.float16), self.weight) * size
        x, step = x.float(), max(1, _WIDENED // (4 * self.in_features))
        out, wide = x.new_empty(len(x), self.out_features), x.new_empty(step, self.in_features)
        for a in range(0, self.out_features, step):
            part = self.weight[a : a + step]
            torch.mm(x, wide[: len(part)].copy_(part).T, out=out[:, a : a + step])
        return out

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch K"]:
        """Some of the rows, in float32."""
        return F.embedding(ids, self.weight).float()


Table: TypeAlias = Float[Tensor, "V width"] | Packed
"""A vector for each token: plain, or packed."""


def pack_table(owner: nn.Module) -> None:
    """Give the owner of a table, its `weight`, that table in float16; where it has none or a packed one, do nothing."""
    if isinstance(weight := owner.weight, nn.Parameter):
        del owner.weight
        owner.weight = HalfLinear(weight)


def look_up(ids: Int[Tensor, "*batch"], table: Table) -> Float[Tensor, "*batch D"]:
    """The rows of a table of vectors, packed or not."""
    if isinstance(table, Packed):
        assert isinstance(table, HalfLinear)  # as `quantise` and the readers of files pack tables
        return table.rows(ids)
    return F.embedding(ids, table)


def project(x: Float[Tensor, "*batch D"], table: Table) -> Float[Tensor, "*batch V"]:
    """The product of each vector with all rows of a table, packed or not."""
    return table(x) if isinstance(table, Packed) else F.linear(x, table)


def is_packed(model: nn.Module) -> bool:
    """Whether some of its weights are packed."""
    return any(isinstance(part, Packed) for part in model.modules())


def quantised(weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None, width: Width) -> Packed:
    """A linear map with its weights rounded: to 255 multiples of a row's scale, or to 16 steps from a group's lowest.

    With `w8a8` what it is given is rounded as well, as it comes.

    Raises:
        ConfigError: `int4`, and rows that are not whole groups of 32.
    """
    weight = weight.detach().float()
    if width != "int4":
        scale = weight.abs().amax(1) / 127
        kind = Int8Linear if width == "int8" else W8A8Linear
        return kind((weight / scale.clamp(min=_TINY)[:, None]).round().to(torch.int8), scale, bias)
    if weight.shape[1] % GROUP:
        raise ConfigError(f"rows of {weight.shape[1]} weights are not whole groups of {GROUP}; use int8")
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1)
    scale = (high - low) / 15
    codes = ((groups - low[..., None]) / scale.clamp(min=_TINY)[..., None]).round()
    return Int4Linear(int4.pack(codes.flatten(1).to(torch.uint8), scale, low), len(weight), weight.shape[1], bias)


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
