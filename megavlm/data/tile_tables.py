"""Where each tile's pixels come from: decoded images in one buffer and the table that `tile_pack` cuts them by.

A host decodes and resizes, and sends uint8 pixels; padding, cutting, normalising and casting are the kernel's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megavlm.data.tile_images import MEAN, STD, Pixels, Resize, resize_bicubic, squared
from megavlm.tiles import GridConfig, ImagePlan, Ints
from megavlm_kernels import tile_pack

CHANNELS = 3


def resized_images(plan: ImagePlan, pixels: Pixels, resize: Resize = resize_bicubic) -> list[Pixels]:
    """The image, or a video's frames, in the sizes that its tiles are cut from: see `resized_sizes`."""
    sizes = resized_sizes(plan)
    if plan.kind == "video":
        assert len(pixels) == plan.tiles, f"{len(pixels)} frames where the plan has {plan.tiles}"
        sources = list(pixels)
    else:
        sources = [squared(pixels) if plan.kind == "one_of_several" else pixels] * len(sizes)
    return [resize(source, width, height) for source, (height, width) in zip(sources, sizes, strict=True)]


def resized_sizes(plan: ImagePlan) -> list[tuple[int, int]]:
    """(height, width) of what the tiles are cut from: a tile's size for each squeezed one, then the grid's image."""
    squeezed = plan.tiles if plan.split is None else 1
    sizes = [(plan.grid.tile_size, plan.grid.tile_size)] * squeezed
    return sizes if plan.split is None else [*sizes, (plan.split.resized_height, plan.split.resized_width)]


def tile_table(plan: ImagePlan, first_byte: int = 0) -> Ints:
    """[plan.tiles, 5]: `tile_pack`'s rows for the resized images of a plan, one behind another from `first_byte` on."""
    wholes = []
    for height, width in resized_sizes(plan):
        wholes.append((first_byte, height, width, 0, 0))
        first_byte += height * width * CHANNELS
    if plan.split is None:
        return np.array(wholes, np.int64)
    base, (*in_grid, _, _) = wholes
    tiles = [(*in_grid, top - plan.split.top, left - plan.split.left) for left, top, _, _ in plan.rectangles]
    return np.array([base, *tiles], np.int64)


def centre_tile(height: int, width: int, side: int, first_byte: int = 0) -> Ints:
    """[1, 5]: the middle square of a resized image, as InfiMM's processor crops it."""
    # A half is rounded to the even number, as there.
    return np.array([[first_byte, height, width, round((height - side) / 2), round((width - side) / 2)]], np.int64)


def image_buffer(
    plans: Sequence[ImagePlan], images: Sequence[Pixels], resize: Resize = resize_bicubic
) -> tuple[Tensor, Tensor]:
    """(images uint8 [bytes], tiles int64 [tiles, 5]) of a batch, as `tile_pack` takes them."""
    parts: list[Pixels] = [np.empty(0, np.uint8)]
    tables = [np.empty((0, 5), np.int64)]
    first_byte = 0
    for plan, pixels in zip(plans, images, strict=True):
        tables.append(tile_table(plan, first_byte))
        resized = [image.reshape(-1) for image in resized_images(plan, pixels, resize)]
        parts += resized
        first_byte += sum(image.size for image in resized)
    return torch.from_numpy(np.concatenate(parts)), torch.from_numpy(np.concatenate(tables))


def packed_patch_rows(images: Tensor, tiles: Tensor, grid: GridConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalised patch rows [tiles * tokens_per_tile, 3 * patch_size**2] of such a buffer, on its device."""
    return tile_pack(
        images,
        tiles,
        patch_size=grid.patch_size,
        patches_per_side=grid.tokens_per_side,
        mean=(MEAN, MEAN, MEAN),
        std=(STD, STD, STD),
        dtype=dtype,
    )
