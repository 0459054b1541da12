"""Rotary position embedding: a rotation of pairs of coordinates by an angle that grows with the position."""

from typing import Literal, NamedTuple

import torch

from qkv.shapes import Float, Int, Tensor


class Rotation(NamedTuple):
    """Cosines and sines of the angles, (B or 1, T, pairs), in at least float32."""

    cos: Tensor
    sin: Tensor


def rotation(
    position: Int[Tensor, "b T"], frequencies: Float[Tensor, " pairs"], *, magnitude: float, dtype: torch.dtype
) -> Rotation:
    """The angles `position * frequency`, in radians, as a `Rotation` of type `dtype`.

    The product is taken in float64: in float32 the angle at position 100,000 is off by several thousandths of a
    radian. It is computed once per forward pass, for all layers.

    Args:
        position: Position of each token, in tokens.
        frequencies: Radians per token of each pair, float64.
        magnitude: What cosines and sines are multiplied with (YaRN's attention factor; 1 otherwise).
        dtype: Type of the result, at least float32.
    """
    angle = position[..., None].to(frequencies.dtype) * frequencies
    return Rotation((angle.cos() * magnitude).to(dtype), (angle.sin() * magnitude).to(dtype))


def rotate(
    x: Float[Tensor, "B T ... K"], by: Rotation, layout: Literal["half", "interleaved"]
) -> Float[Tensor, "B T ... K"]:
    """Rotate the coordinates of each head, pair by pair; those beyond the angles stay as they are.

    Source: Su et al. 2021 (RoFormer), section 3.4.2, which pairs neighbours ("interleaved"). GPT-NeoX, and with it the
    Hugging Face form of Llama, pairs coordinate i with i + K/2 ("half").

    Args:
        x: Queries or keys, with any number of axes between T and K.
        by: The angles; computed in at least float32 and applied in that type.
        layout: Which coordinates make a pair.
    """
    width = 2 * by.cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], by, layout), x[..., width:]], dim=-1)
    shape = (*by.cos.shape[:2], *(1 for _ in range(x.dim() - 3)), by.cos.shape[-1])
    cos, sin = by.cos.view(shape), by.sin.view(shape)
    wide = x.to(cos.dtype)
    if layout == "half":
        a, b = wide.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
    a, b = wide[..., 0::2], wide[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)
