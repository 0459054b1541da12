"""Pictures as patches, and back: squares that do not overlap, row by row (Dosovitskiy et al. 2021, section 3.1)."""

from collections.abc import Sequence

from qkv.errors import ConfigError
from qkv.shapes import Shaped, Tensor


def patchify(picture: Shaped[Tensor, "C H W"], patch: int) -> Shaped[Tensor, "T values"]:
    """The patches of a picture, T = H·W / patch², each as its C·patch² values: channel by channel, row by row.

    A linear map of them is the convolution by which other libraries do it, with its weight (D, C, patch, patch) flat.

    Raises:
        ConfigError: A side is no multiple of `patch`, or there is no picture.
    """
    (h, w), c = grid(picture.shape, patch), len(picture)
    return picture.reshape(c, h, patch, w, patch).permute(1, 3, 0, 2, 4).reshape(h * w, c * patch**2)


def grid(shape: Sequence[int], patch: int) -> tuple[int, int]:
    """Rows and columns of patches of a picture (C, H, W). Errors as of `patchify`."""
    _, h, w = shape
    if not (h and w) or h % patch or w % patch:
        raise ConfigError(f"a picture of {h} x {w} (height x width) does not fall into patches of {patch}; resize it")
    return h // patch, w // patch


def unpatchify(patches: Shaped[Tensor, "T values"], grid: tuple[int, int], patch: int) -> Shaped[Tensor, "C H W"]:
    """The picture of which `patchify` makes these patches.

    Args:
        patches: As `patchify` gives them.
        grid: Rows and columns of patches.
        patch: Pixels of a side of one.

    Raises:
        ConfigError: The patches are not of that number, or not of that size.
    """
    (t, f), (h, w) = patches.shape, grid
    if t != h * w or f % patch**2:
        raise ConfigError(
            f"patches are {t} of {f} values and a grid of {h} x {w} has {h * w}, of a multiple of {patch**2} values; "
            "give the grid and the patch that they were made with"
        )
    parts = patches.reshape(h, w, f // patch**2, patch, patch)
    return parts.permute(2, 0, 3, 1, 4).reshape(f // patch**2, h * patch, w * patch)
