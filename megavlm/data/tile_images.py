"""From an image's pixels to the patch rows of its tiles: the pixel side of the image-token contract in `megavlm.tiles`.

This is the reference. Its resize is PIL's, bit by bit, or torch's, several times as fast and hardly to be told apart.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from megavlm.tiles import GridConfig, ImagePlan, Split, patch_rows

Pixels = NDArray[np.uint8]
Resize = Callable[[Pixels, int, int], Pixels]
"""(pixels [H, W, 3], width, height) -> pixels [height, width, 3]"""

MEAN = STD = 0.5
"""SigLIP's, of values from 0 to 1."""
SQUARE_BORDER = int(255 * MEAN)
"""The grey around one of several images; the border inside a grid is black, before normalising, in the public code."""

_NORMALISED = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(MEAN)) / np.float32(STD)


def resize_bicubic(pixels: Pixels, width: int, height: int) -> Pixels:
    """PIL's bicubic resize, antialiased: what the public image processors use."""
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def resize_quick(pixels: Pixels, width: int, height: int) -> Pixels:
    """The same by torch's vectorised filter, whose weights have 16 bits.

    Of 60 million values of random sizes, half of them black or white alone, 16 in a million were 2 off, none more.
    """
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    if is_vertical_first(pixels.shape[1], pixels.shape[0], width, height):
        image = _resized(image, pixels.shape[1], height)
    return _resized(image, width, height)[0].permute(1, 2, 0).contiguous().numpy()


def is_vertical_first(width: int, height: int, new_width: int, new_height: int) -> bool:
    """Whether Pillow 13 resizes columns before rows. It rounds and clips in between, so edges of black and white tell.

    Found by comparing both orders over 1,400 sizes; torch takes rows first, always.
    """
    return new_height < height and 2 * (width - new_width) < height - new_height


def _resized(image: Tensor, width: int, height: int) -> Tensor:
    return F.interpolate(image, (height, width), mode="bicubic", antialias=True)


def tile_pixels(plan: ImagePlan, pixels: Pixels, resize: Resize = resize_bicubic) -> Tensor:
    """The image [height, width, 3], or a video's frames [frames, height, width, 3], as normalised patch rows.

    float32 [plan.patch_rows, 3 * patch_size**2].
    """
    tiles = _NORMALISED[cut_tiles(plan, pixels, resize)]
    whole_patches = plan.grid.tokens_per_side * plan.grid.patch_size
    used = torch.from_numpy(tiles[:, :whole_patches, :whole_patches])
    return patch_rows(used.permute(0, 3, 1, 2), plan.grid.patch_size)


def cut_tiles(plan: ImagePlan, pixels: Pixels, resize: Resize = resize_bicubic) -> Pixels:
    """The tiles [plan.tiles, tile_size, tile_size, 3], in the tower's order."""
    assert pixels.dtype == np.uint8 and pixels.shape[-3:] == (plan.height, plan.width, 3), (pixels.dtype, pixels.shape)
    size = plan.grid.tile_size
    if plan.kind == "video":
        assert len(pixels) == plan.tiles, f"{len(pixels)} frames where the plan has {plan.tiles}"
        return np.stack([resize(frame, size, size) for frame in pixels])
    if plan.kind == "one_of_several":
        return resize(squared(pixels), size, size)[None]
    base = resize(pixels, size, size)
    if plan.split is None:
        return base[None]
    canvas = _padded(pixels, plan.split, plan.grid, resize)
    return np.stack([base, *(canvas[top:bottom, left:right] for left, top, right, bottom in plan.rectangles)])


def _padded(pixels: Pixels, split: Split[int], grid: GridConfig, resize: Resize) -> Pixels:
    """The image in the middle of its grid, on black."""
    canvas = np.zeros((split.rows * grid.tile_size, split.columns * grid.tile_size, 3), np.uint8)
    rows = slice(split.top, split.top + split.resized_height)
    columns = slice(split.left, split.left + split.resized_width)
    canvas[rows, columns] = resize(pixels, split.resized_width, split.resized_height)
    return canvas


def squared(pixels: Pixels) -> Pixels:
    """The image in the middle of a grey square.

    The square of the long side is held in memory, as in the public code: callers limit that, not only the pixels.
    """
    height, width, _ = pixels.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.full((side, side, 3), SQUARE_BORDER, np.uint8)
    square[top : top + height, left : left + width] = pixels
    return square
