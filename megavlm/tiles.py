"""How the pixels of image tiles lie in memory: the contract between data, which packs them, and the vision towers."""

from __future__ import annotations

from torch import Tensor


def patch_rows(images: Tensor, patch_size: int) -> Tensor:
    """Images [images, channels, height, width] as patch rows [images * patches, channels * patch_size**2].

    A row holds one patch in the order (channel, y, x), that of a convolution's weight, so a patch embedding is one
    matrix product. The patches of an image follow one another row-major (left to right, then down), images one behind
    another.
    """
    images_, channels, height, width = images.shape
    assert height % patch_size == 0 and width % patch_size == 0, f"{height}x{width} holds no whole {patch_size}-patches"
    down, across = height // patch_size, width // patch_size
    cut = images.reshape(images_, channels, down, patch_size, across, patch_size)
    patches = images_ * down * across
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(patches, channels * patch_size * patch_size)
