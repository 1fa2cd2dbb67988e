"""tile_pack, the public function: checks and the choice of path; pixels have no gradient."""

from __future__ import annotations

import torch

from megavlm_kernels.checks import DTYPES, require, require_device
from megavlm_kernels.dispatch import is_without_data, takes_triton
from megavlm_kernels.tiles.host import tile_pack_host
from megavlm_kernels.tiles.reference import CHANNELS, Triple, tile_pack_reference

COLUMNS = ("first byte", "height", "width", "top", "left")


def tile_pack(
    images: torch.Tensor,
    tiles: torch.Tensor,
    *,
    patch_size: int,
    patches_per_side: int,
    mean: Triple,
    std: Triple,
    border: Triple = (0, 0, 0),
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Cuts tiles out of decoded images and gives their patches as normalised rows.

    images uint8 [bytes]: pixels [height, width, 3] of any number of images, already resized, one behind another.
    tiles int64 [tiles, 5]: of each tile the first byte of its image, that image's height and width, and the (top,
    left) of the tile in it, which may be negative or beyond: what lies outside the image takes `border`, 0 to 255.
    A tile is a square of patches_per_side patches of patch_size pixels. Tiles may lie in any order and may overlap.

    Returns dtype [tiles * patches_per_side**2, 3 * patch_size**2]: the tiles in the order of the table, the patches of
    each row-major, the values of a patch in the order (channel, y, x): (pixel / 255 - mean) / std, in fp32 with each
    step rounded to the nearest, then cast.
    """
    _check(images, tiles, patch_size, patches_per_side, dtype)
    if takes_triton(images):
        from megavlm_kernels.tiles import triton_kernel

        normal = triton_kernel.Normal(mean, std, border)
        return triton_kernel.forward(
            images.contiguous(), tiles.contiguous(), patch_size, patches_per_side, normal, dtype
        )
    is_host = images.is_cpu and not is_without_data(tiles) and not is_without_data(images)
    plain = tile_pack_host if is_host else tile_pack_reference
    return plain(images, tiles, patch_size, patches_per_side, mean, std, border, dtype)


def _check(
    images: torch.Tensor, tiles: torch.Tensor, patch_size: int, patches_per_side: int, dtype: torch.dtype
) -> None:
    require(images.dim() == 1, "images.shape", tuple(images.shape), "flatten the pixels of all images to one dimension")
    require(images.dtype == torch.uint8, "images.dtype", images.dtype, "use uint8")
    shape = tuple(tiles.shape)
    require(len(shape) == 2 and shape[1] == len(COLUMNS), "tiles.shape", shape, f"give [tiles, {len(COLUMNS)}]")
    require(tiles.dtype == torch.int64, "tiles.dtype", tiles.dtype, "use int64")
    require(patch_size > 0, "patch_size", patch_size, "use 1 or more")
    require(patches_per_side > 0, "patches_per_side", patches_per_side, "use 1 or more")
    require(dtype in DTYPES, "dtype", dtype, "use bfloat16, float16 or float32")
    require_device(images.device, tiles=tiles)
    if tiles.is_cpu and not is_without_data(tiles) and len(tiles):
        # On a GPU reading them back would make the host wait; there a pixel beyond the buffer counts as outside.
        first, height, width = tiles[:, 0], tiles[:, 1], tiles[:, 2]
        is_held = (first >= 0) & (height > 0) & (width > 0) & (first + height * width * CHANNELS <= images.numel())
        if not is_held.all():
            bad = int((~is_held).nonzero()[0])
            found = ", ".join(f"{name} {value}" for name, value in zip(COLUMNS, tiles[bad].tolist(), strict=True))
            require(False, f"tiles[{bad}]", found, f"its image has to lie within the {images.numel()} bytes of images")
