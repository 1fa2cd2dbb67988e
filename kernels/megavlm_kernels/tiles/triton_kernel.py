"""tile_pack in Triton: each program writes some patch rows of one tile, or a stretch of their columns.

Where a value comes from depends on its column through (channel, y, x) within the patch, and on its row through the
patch's place in the tile: the first is worked out once for all rows of a program. Writes are whole lines; the bytes
of a line of pixels are read once from memory and by several warps from the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from megavlm_kernels.launch import Launch, ceil_div, power_of_two
from megavlm_kernels.tiles.reference import CHANNELS, Triple

BLOCK_ELEMENTS = 2048
"""Of the output in one program: 16 per thread at four warps; 32 would cost half of the threads a chip can hold."""


class Normal(NamedTuple):
    """What a pixel becomes, for each channel."""

    mean: Triple
    std: Triple
    border: Triple

    def arguments(self) -> dict[str, float]:
        return {
            f"{name}_{channel}": float(value)
            for name, values in self._asdict().items()
            for channel, value in enumerate(values)
        }


@triton.jit
def of_channel(channel, first, second, third):
    return tl.where(channel == 0, first, tl.where(channel == 1, second, third))


@triton.jit
def forward_kernel(
    images, tiles, out, image_bytes,
    mean_0, mean_1, mean_2, std_0, std_1, std_2, border_0, border_1, border_2,
    PATCH: tl.constexpr, PER_SIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    start = tl.load(tiles + tile * 5)
    height, width = tl.load(tiles + tile * 5 + 1), tl.load(tiles + tile * 5 + 2)
    top, left = tl.load(tiles + tile * 5 + 3), tl.load(tiles + tile * 5 + 4)
    patch = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(2) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    channel, within = column // (PATCH * PATCH), column % (PATCH * PATCH)
    patch_y, patch_x = top + patch // PER_SIDE * PATCH, left + patch % PER_SIDE * PATCH
    y_in_patch, x_in_patch = within // PATCH, within % PATCH
    # Numbers of 64 bits are kept to rows and columns by themselves: each element adds two of them, no more.
    from_row = start + (patch_y * width + patch_x) * 3
    from_column = (y_in_patch * width + x_in_patch) * 3 + channel
    address = from_row[:, None] + from_column[None, :]
    y = patch_y.to(tl.int32)[:, None] + y_in_patch[None, :]
    x = patch_x.to(tl.int32)[:, None] + x_in_patch[None, :]
    is_inside = (y >= 0) & (y < height.to(tl.int32)) & (x >= 0) & (x < width.to(tl.int32))
    is_inside &= (address >= 0) & (address < image_bytes)
    keep = (patch < PER_SIDE * PER_SIDE)[:, None] & (column < 3 * PATCH * PATCH)[None, :]
    pixel = tl.load(images + address, mask=keep & is_inside, other=0).to(tl.float32)
    pixel = tl.where(is_inside, pixel, of_channel(channel, border_0, border_1, border_2)[None, :])
    mean = of_channel(channel, mean_0, mean_1, mean_2)[None, :]
    std = of_channel(channel, std_0, std_1, std_2)[None, :]
    # A plain division of the compiler's is an approximation, up to two bits off.
    value = tl.div_rn(
        tl.div_rn(pixel, tl.full(pixel.shape, 255.0, tl.float32)) - mean, tl.broadcast_to(std, pixel.shape)
    )
    row = tile * (PER_SIDE * PER_SIDE) + patch
    tl.store(out + row[:, None] * (3 * PATCH * PATCH) + column[None, :], value.to(out.dtype.element_ty), mask=keep)


def forward_launch(
    images: torch.Tensor, tiles: torch.Tensor, out: torch.Tensor, patch_size: int, patches_per_side: int, normal: Normal
) -> Launch:
    patches, width = patches_per_side**2, CHANNELS * patch_size**2
    block_width = power_of_two(width, 16, 128)
    block_rows = power_of_two(patches, 1, BLOCK_ELEMENTS // block_width)
    return Launch(
        kernel=forward_kernel,
        grid=(tiles.shape[0], ceil_div(patches, block_rows), ceil_div(width, block_width)),
        arguments={
            "images": images, "tiles": tiles, "out": out, "image_bytes": images.numel(), **normal.arguments(),
        },
        constants={
            "PATCH": patch_size, "PER_SIDE": patches_per_side, "BLOCK_ROWS": block_rows, "BLOCK_WIDTH": block_width,
        },
        num_warps=4,
        num_stages=1,
    )  # fmt: skip


def forward(
    images: torch.Tensor,
    tiles: torch.Tensor,
    patch_size: int,
    patches_per_side: int,
    normal: Normal,
    dtype: torch.dtype,
) -> torch.Tensor:
    shape = (tiles.shape[0] * patches_per_side**2, CHANNELS * patch_size**2)
    out = torch.empty(shape, dtype=dtype, device=images.device)
    forward_launch(images, tiles, out, patch_size, patches_per_side, normal).run()
    return out
