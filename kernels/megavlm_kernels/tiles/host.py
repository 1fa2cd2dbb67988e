"""tile_pack on the CPU: the reference's bits, tile by tile, by slices and a table instead of an address for each value.

What a byte becomes is worked out once for each channel and looked up. At Aquila-VL-2B's size a tile takes 0.7 ms of one
core, where the reference takes 7, and as long again to get fresh memory for its float32. numpy does it because torch
would start threads of its own for each step; here each thread has tiles of its own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megavlm_kernels.tiles.reference import CHANNELS, Triple, normalise

BYTES = 256
_BITS = {2: torch.int16, 4: torch.int32}
"""Values are moved as whole numbers of their size: numpy knows no bfloat16."""
_OFFSETS = (np.arange(CHANNELS, dtype=np.uint16) * BYTES)[:, None, None]
_OUTSIDE = np.arange(CHANNELS * BYTES, CHANNELS * (BYTES + 1), dtype=np.uint16)[:, None, None]
"""Of each channel, where its bytes begin in the table, and where what lies outside an image stands."""


def tile_pack_host(
    images: torch.Tensor,
    tiles: torch.Tensor,
    patch_size: int,
    patches_per_side: int,
    mean: Triple,
    std: Triple,
    border: Triple,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Arguments as in `op.tile_pack`; the images have to lie within the buffer, as it checks."""
    out = torch.empty(len(tiles), patches_per_side, patches_per_side, CHANNELS, patch_size, patch_size, dtype=dtype)
    bits = _BITS[dtype.itemsize]
    cuts, table = out.view(bits).numpy(), _table(mean, std, border).to(dtype).view(bits).numpy()
    pixels, rows = images.numpy(), tiles.tolist()
    threads = max(1, min(torch.get_num_threads(), len(rows)))

    def pack(thread: int) -> None:
        index = np.empty(cuts.shape[1:], np.uint16)
        for row, cut in zip(rows[thread::threads], cuts[thread::threads], strict=True):
            _look_up(pixels, row, index, table, cut)

    if threads == 1:
        pack(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(pack, range(threads)))
    return out.view(-1, CHANNELS * patch_size**2)


def _table(mean: Triple, std: Triple, border: Triple) -> torch.Tensor:
    """float32: what each byte of each channel becomes, then what lies outside."""
    bytes_ = torch.arange(BYTES).float().expand(CHANNELS, 1, -1)
    edges = torch.tensor(border).float()[:, None, None]
    return torch.cat([normalise(each, mean, std).flatten() for each in (bytes_, edges)])


def _look_up(
    pixels: NDArray[np.uint8], row: list[int], index: NDArray[np.uint16], table: NDArray[Any], cut: NDArray[Any]
) -> None:
    """One row of the tiles' table into its patches [P, P, 3, p, p]; `index` is room to work in, of the same shape."""
    first, height, width, top, left = row
    patch_size = cut.shape[-1]
    side = cut.shape[0] * patch_size
    (rows, image_rows), (columns, image_columns) = _overlap(top, side, height), _overlap(left, side, width)
    image = pixels[first : first + height * width * CHANNELS].reshape(height, width, CHANNELS)
    tile = image[image_rows, image_columns]
    is_full = tile.shape[:2] == (side, side)
    if not is_full:
        inside, tile = tile, np.zeros((side, side, CHANNELS), np.uint8)
        tile[rows, columns] = inside
    np.add(np.ascontiguousarray(_patches(tile, patch_size)), _OFFSETS, out=index)
    if not is_full:
        is_outside = np.ones((side, side, 1), np.bool_)
        is_outside[rows, columns] = False
        np.copyto(index, _OUTSIDE, where=_patches(is_outside, patch_size))
    # Without a mode that looks at every index first; all are within the table.
    np.take(table, index, out=cut, mode="clip")


def _patches(tile: NDArray[Any], patch_size: int) -> NDArray[Any]:
    """[side, side, channels] as a view [P, P, channels, p, p]."""
    down, right, channel = tile.strides
    shape = (len(tile) // patch_size, patch_size) * 2 + (tile.shape[2],)
    strides = (down * patch_size, down, right * patch_size, right, channel)
    return np.lib.stride_tricks.as_strided(tile, shape, strides).transpose(0, 2, 4, 1, 3)


def _overlap(first: int, side: int, length: int) -> tuple[slice, slice]:
    """What a tile's side and its image's have in common: the places on the tile, and those on the image."""
    start = min(max(first, 0), length)
    stop = min(max(first + side, start), length)
    return slice(start - first, stop - first), slice(start, stop)
