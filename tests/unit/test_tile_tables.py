"""Tables that tiles are cut by: `tile_pack` on them gives the contract's pixels, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megavlm.data.tile_images import Pixels, tile_pixels
from megavlm.data.tile_tables import centre_tile, image_buffer, packed_patch_rows, resized_images, resized_sizes
from megavlm.tiles import STAGE_GRIDS, GridConfig, MediaKind, plan_image
from megavlm_kernels import tile_pack

GRIDS = [
    GridConfig(tile_size=98, max_tiles_per_side=3, cap_tiles=5),
    GridConfig(tile_size=40, patch_size=7, max_tiles_per_side=6, cap_tiles=9),
    GridConfig(tile_size=98, tiling="single"),
]


def noise(*shape: int) -> Pixels:
    return np.random.default_rng(3).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.tile_size}-{grid.tiling}")
def test_a_batch_equals_the_tiles_of_its_images(grid: GridConfig) -> None:
    sizes = [(98, 98), (1, 1), (300, 41), (40, 500), (250, 251), (1, 120)]
    plans = [plan_image(width, height, "image", grid) for height, width in sizes]
    images = [noise(*size) for size in sizes]
    plans += [plan_image(30, 77, "one_of_several", grid), plan_image(60, 50, "video", grid, frames=3)]
    images += [noise(77, 30), noise(3, 50, 60)]
    found = packed_patch_rows(*image_buffer(plans, images), grid)
    expected = torch.cat([tile_pixels(plan, pixels) for plan, pixels in zip(plans, images, strict=True)])
    assert torch.equal(found, expected)


def test_the_released_models_tiles() -> None:
    grid = STAGE_GRIDS["3"]
    plan, pixels = plan_image(900, 500, "image", grid), noise(500, 900)
    assert plan.tiles == 7
    found = packed_patch_rows(*image_buffer([plan], [pixels]), grid, torch.bfloat16)
    assert torch.equal(found, tile_pixels(plan, pixels).bfloat16())


def test_a_batch_without_images() -> None:
    grid = GRIDS[0]
    assert packed_patch_rows(*image_buffer([], []), grid).shape == (0, 588)


@pytest.mark.parametrize("kind", ["image", "one_of_several"])
def test_images_are_resized_to_the_sizes_that_are_told(kind: MediaKind) -> None:
    plan = plan_image(300, 41, kind, GRIDS[0])
    assert [image.shape[:2] for image in resized_images(plan, noise(41, 300))] == resized_sizes(plan)


def test_frames_of_another_number_than_the_plans_are_refused() -> None:
    with pytest.raises(AssertionError, match="2 frames where the plan has 3"):
        resized_images(plan_image(60, 50, "video", GRIDS[0], frames=3), noise(2, 50, 60))


@pytest.mark.parametrize(
    ("height", "width", "top", "left"),
    [(56, 74, 0, 9), (74, 56, 9, 0), (56, 113, 0, 28), (56, 115, 0, 30), (56, 56, 0, 0)],
)
def test_the_middle_square_of_infimm(height: int, width: int, top: int, left: int) -> None:
    table = centre_tile(height, width, 56)
    assert table.tolist() == [[0, height, width, top, left]]
    pixels = noise(height, width)
    given = torch.from_numpy(pixels.reshape(-1)), torch.from_numpy(table)
    found = tile_pack(*given, patch_size=56, patches_per_side=1, mean=(0, 0, 0), std=(1, 1, 1))
    crop = torch.from_numpy(pixels[top : top + 56, left : left + 56]).permute(2, 0, 1)
    assert torch.equal(found, (crop.float() / 255).reshape(1, -1))
