"""Rotary position embedding: a rotation of pairs of coordinates by an angle that grows with the position."""

from typing import Literal, NamedTuple, TypeAlias

import torch

from qkv.shapes import Float, Shaped, Tensor

RotaryLayout: TypeAlias = Literal["half", "interleaved"]
"""Which coordinates make a pair: i and i + K/2 (GPT-NeoX, the Hugging Face form of Llama), or neighbours (RoFormer)."""


class Rotation(NamedTuple):
    """What each coordinate, and its partner in the pair, are multiplied with: x · cos + partner(x) · sin.

    Attributes:
        cos: Cosines, (B or 1, T, K), in at least float32; K coordinates are half as many pairs.
        sin: Sines likewise, negative for the first of a pair.
    """

    cos: Tensor
    sin: Tensor
    layout: RotaryLayout


def frequencies(theta: float | Float[Tensor, "b t 1"], width: int, device: torch.device) -> Float[Tensor, "*b_t pairs"]:
    """θ^(-2i / K) for pair i of K = `width` coordinates: radians per token, float64."""
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)


def angles(position: Shaped[Tensor, "..."], frequencies: Float[Tensor, "*b_t pairs"]) -> Float[Tensor, "... pairs"]:
    """`position * frequency` in radians, for each pair.

    The product is taken in float64: in float32 the angle at position 100,000 is off by several thousandths of a
    radian.
    """
    return position[..., None].to(frequencies.dtype) * frequencies


def rotation(
    angle: Float[Tensor, "b T pairs"], layout: RotaryLayout, *, magnitude: float = 1.0, dtype: torch.dtype
) -> Rotation:
    """The angles of pairs, in radians, as a `Rotation` of type `dtype`.

    Cosines and sines are multiplied with `magnitude` (YaRN's attention factor).
    """
    cos, sin = (angle.cos() * magnitude).to(dtype), (angle.sin() * magnitude).to(dtype)
    if layout == "half":
        return Rotation(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1), layout)
    return Rotation(torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2), layout)


def rotate(x: Float[Tensor, "B T ... K"], by: Rotation) -> Float[Tensor, "B T ... K"]:
    """Rotate the coordinates of each head, pair by pair; those beyond the angles stay as they are.

    Source: Su et al. 2021 (RoFormer), section 3.4.2, equation 34.
    """
    width = by.cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], by), x[..., width:]], dim=-1)
    shape = (*by.cos.shape[:2], *(1,) * (x.dim() - 3), width)
    neighbours = by.layout == "interleaved"
    partner = torch.stack([x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2) if neighbours else x.roll(width // 2, -1)
    return (x * by.cos.view(shape) + partner * by.sin.view(shape)).to(x.dtype)
