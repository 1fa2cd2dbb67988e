"""The image-token contract: the published numbers, plans written out by hand, and where every patch lies."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_sizes import random_sizes

from megavlm.errors import ConfigError, DataError
from megavlm.tiles import (
    LONGEST_SIDE,
    STAGE_GRIDS,
    GridConfig,
    MediaKind,
    patch_rows,
    plan_image,
    split_images,
    tile_counts,
    token_counts,
)

GRID_STAGES = ("2a", "2b", "2c", "3", "4")

# (width, height) -> for the stages 2a, 2b, 2c and 3: (columns, rows) of the grid, (rows, columns) of the map kept,
# (rows, columns) under the cap, tokens
PUBLISHED: dict[tuple[int, int], tuple[tuple[tuple[int, int], tuple[int, int], tuple[int, int], int], ...]] = {
    (384, 384): (((1, 1), (27, 27), (27, 27), 1485),) * 4,
    (500, 500): (((2, 2), (54, 54), (54, 54), 3699),) * 4,
    (640, 480): (((2, 2), (40, 54), (40, 54), 2929),) * 4,
    (1024, 899): (
        ((2, 2), (48, 54), (48, 54), 3369),
        ((3, 3), (71, 81), (56, 64), 4369),
        ((3, 3), (71, 81), (61, 70), 5060),
        ((3, 3), (71, 81), (71, 81), 6551),
    ),
    (1000, 750): (((2, 2), (40, 54), (40, 54), 2929), *(((3, 2), (54, 73), (54, 73), 4725),) * 3),
    (1920, 1080): (
        ((2, 2), (30, 54), (30, 54), 2379),
        ((3, 2), (46, 81), (46, 81), 4501),
        ((4, 3), (61, 108), (49, 88), 5090),
        ((5, 3), (75, 135), (60, 108), 7269),
    ),
    (800, 2400): (
        ((1, 2), (54, 19), (54, 19), 1809),
        ((1, 3), (81, 27), (81, 27), 2997),
        ((2, 4), (108, 36), (108, 36), 4725),
        ((2, 6), (162, 54), (140, 46), 7309),
    ),
    (3000, 400): (
        ((2, 1), (7, 54), (7, 54), 1114),
        ((3, 1), (11, 81), (11, 81), 1631),
        ((4, 1), (15, 108), (15, 108), 2364),
        ((6, 1), (21, 162), (21, 162), 4152),
    ),
    (5000, 5000): (
        ((2, 2), (54, 54), (54, 54), 3699),
        ((3, 3), (81, 81), (60, 60), 4389),
        ((4, 4), (108, 108), (66, 66), 5151),
        ((6, 6), (162, 162), (81, 81), 7371),
    ),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_give_the_published_grids_and_tokens(size: tuple[int, int]) -> None:
    for stage, expected in zip(("2a", "2b", "2c", "3"), PUBLISHED[size], strict=True):
        plan = plan_image(*size, "image", STAGE_GRIDS[stage])
        split = plan.split
        assert split is not None
        kept, shrunk = (split.map_rows, split.map_columns), (split.token_rows, split.token_columns)
        assert ((split.columns, split.rows), kept, shrunk, plan.tokens) == expected, stage
        assert plan.is_shrunk == (kept != shrunk)


def test_stages_have_the_papers_grids_and_budgets() -> None:
    budgets = {"1": 0, "2a": 4, "2b": 5, "2c": 6, "3": 9, "4": 9}  # tiles beside the base tile
    sides = {"2a": 2, "2b": 3, "2c": 4, "3": 6, "4": 6}
    assert STAGE_GRIDS.keys() == budgets.keys()
    assert {stage: STAGE_GRIDS[stage].max_tiles_per_side for stage in sides} == sides
    assert {stage: STAGE_GRIDS[stage].cap_tiles for stage in sides} == {stage: budgets[stage] for stage in sides}
    assert [stage for stage, grid in STAGE_GRIDS.items() if grid.tiling == "single"] == ["1"]
    assert {(grid.tile_size, grid.patch_size) for grid in STAGE_GRIDS.values()} == {(384, 14)}


@pytest.mark.parametrize(("stage", "most"), [("2a", 3699), ("2b", 5184), ("2c", 6119), ("3", 8765), ("4", 8765)])
def test_the_costliest_size_costs_what_is_known(stage: str, most: int) -> None:
    sides = np.arange(50, 2500, 7)
    assert token_counts(sides[:, None], sides, "image", STAGE_GRIDS[stage]).max() == most


@pytest.mark.parametrize(
    ("kind", "stage", "frames", "tiles", "tokens"),
    [
        ("image", "1", 1, 1, 729),
        ("one_of_several", "1", 1, 1, 729),
        ("video", "1", 32, 32, 32 * 196),
        ("one_of_several", "2a", 1, 1, 730),
        ("one_of_several", "4", 1, 1, 730),
        ("video", "3", 1, 1, 197),
        ("video", "3", 32, 32, 6273),
    ],
)
def test_media_without_a_map_cost_the_same_whatever_their_size(
    kind: MediaKind, stage: str, frames: int, tiles: int, tokens: int
) -> None:
    grid = STAGE_GRIDS[stage]
    for width, height in [(1, 1), (384, 384), (1920, 1080), (20, 4000)]:
        plan = plan_image(width, height, kind, grid, frames)
        assert (plan.tiles, plan.tokens, plan.patch_rows) == (tiles, tokens, tiles * 729)
        assert plan.split is None and plan.rectangles == [] and not plan.is_shrunk
    assert token_counts([1, 1920], [1, 1080], kind, grid, frames).tolist() == [tokens, tokens]
    assert tile_counts([1, 1920], [1, 1080], kind, grid, frames).tolist() == [tiles, tiles]


def test_one_plan_written_out() -> None:
    plan = plan_image(1000, 750, "image", STAGE_GRIDS["2b"])
    split = plan.split
    assert split is not None
    assert (split.columns, split.rows) == (3, 2)  # 1152 x 768
    assert (split.resized_width, split.resized_height) == (1024, 768)
    assert (split.left, split.top) == (64, 0)
    # 81 columns of features for 1152 pixels: 1000 * 54 / 750 = 72 hold the image, (81 - 72) // 2 go on either side
    assert (split.first_map_row, split.first_map_column, split.map_rows, split.map_columns) == (0, 4, 54, 73)
    assert plan.tiles == 7 and plan.patch_rows == 7 * 729
    assert plan.rectangles == [
        (0, 0, 384, 384),
        (384, 0, 768, 384),
        (768, 0, 1152, 384),
        (0, 384, 384, 768),
        (384, 384, 768, 768),
        (768, 384, 1152, 768),
    ]
    rows = plan.map_patch_rows()
    assert rows.shape == (54, 73)
    assert rows[0, 0] == 1 * 729 + 0 * 27 + 4  # the fifth patch of the first tile after the base tile
    assert rows[0, 22] == 1 * 729 + 0 * 27 + 26 and rows[0, 23] == 2 * 729  # over the edge, into the next tile
    assert rows[27, 0] == 4 * 729 + 0 * 27 + 4  # down into the second row of tiles
    assert rows[53, 72] == 6 * 729 + 26 * 27 + (4 + 72 - 54)


@pytest.mark.parametrize(
    ("size", "grid", "resized", "kept", "tokens"),
    [
        ((1, 1), (1, 1), (384, 384), (27, 27), 729 + 27 * 28),
        ((1, 384), (1, 1), (1, 384), (27, 1), 729 + 27 * 2),
        ((384, 1), (1, 1), (384, 1), (1, 27), 729 + 1 * 28),
        ((1, 2304), (1, 6), (1, 2304), (162, 1), 729 + 162 * 2),
        ((10_000, 1), (1, 1), (384, 1), (1, 27), 729 + 1 * 28),  # no grid shows a pixel of its height: the least one
        ((4000, 20), (6, 1), (2304, 12), (1, 162), 729 + 1 * 163),
        ((60, 4000), (1, 6), (35, 2304), (162, 3), 729 + 162 * 4),  # 60 * 162 / 4000 = 2.4 columns, and an odd rest
        ((400, 2), (2, 1), (768, 4), (1, 54), 729 + 1 * 55),
    ],
)
def test_thin_images_have_defined_plans(
    size: tuple[int, int], grid: tuple[int, int], resized: tuple[int, int], kept: tuple[int, int], tokens: int
) -> None:
    plan = plan_image(*size, "image", STAGE_GRIDS["3"])
    split = plan.split
    assert split is not None
    found = (
        (split.columns, split.rows),
        (split.resized_width, split.resized_height),
        (split.map_rows, split.map_columns),
    )
    assert (*found, plan.tokens) == (grid, resized, kept, tokens)


def test_a_thin_map_with_an_even_side_may_be_empty() -> None:
    grid = GridConfig(tile_size=56, max_tiles_per_side=2, cap_tiles=2)
    plan = plan_image(5000, 1, "image", grid)
    assert plan.split is not None and plan.split.map_rows == 0
    assert plan.tokens == grid.tokens_per_tile == 16
    assert plan.map_patch_rows().shape == (0, 4)


@pytest.mark.parametrize("stage", GRID_STAGES)
def test_many_images_at_once_give_what_one_by_one_gives(stage: str) -> None:
    grid = STAGE_GRIDS[stage]
    widths, heights = random_sizes(1000, seed=2)
    splits = split_images(widths, heights, grid)
    tokens, tiles = token_counts(widths, heights, "image", grid), tile_counts(widths, heights, "image", grid)
    for index, (width, height) in enumerate(zip(widths.tolist(), heights.tolist(), strict=True)):
        plan = plan_image(width, height, "image", grid)
        assert plan.split == tuple(int(numbers[index]) for numbers in splits), (width, height)
        assert (plan.tokens, plan.tiles) == (tokens[index], tiles[index]), (width, height)


@pytest.mark.parametrize("stage", GRID_STAGES)
def test_every_plan_holds_together(stage: str) -> None:
    grid = STAGE_GRIDS[stage]
    split = split_images(*random_sizes(100_000, seed=3), grid)
    grid_width, grid_height = split.columns * grid.tile_size, split.rows * grid.tile_size
    assert ((split.resized_width == grid_width) | (split.resized_height == grid_height)).all()
    assert (split.left + split.resized_width <= grid_width).all() and (split.left >= 0).all()
    assert (split.top + split.resized_height <= grid_height).all() and (split.top >= 0).all()
    assert (split.map_rows >= 1).all() and (split.map_columns >= 1).all()
    assert ((split.first_map_row == 0) | (split.first_map_column == 0)).all()
    assert (split.token_rows * split.token_columns <= 1.21 * grid.cap_tiles * grid.tokens_per_tile).all()
    assert (split.token_rows >= 1).all() and (split.token_columns >= 1).all()


def test_a_million_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    widths, heights = random_sizes(1_000_000, seed=4)
    before = time.perf_counter()
    tokens = token_counts(widths, heights, "image", STAGE_GRIDS["3"])
    seconds = time.perf_counter() - before
    with capsys.disabled():
        print(f"\ntokens of a million sizes: {seconds:.2f} s")
    some = slice(None, None, 50_000)
    assert tokens.shape == (1_000_000,)
    assert tokens[some].tolist() == token_counts(widths[some], heights[some], "image", STAGE_GRIDS["3"]).tolist()


def test_the_counts_take_any_whole_numbers_and_shapes() -> None:
    grid = STAGE_GRIDS["3"]
    small = np.array([60_000, 640], np.uint16)
    assert token_counts(small, np.array([[60_000], [480]], np.uint16), "image", grid).shape == (2, 2)
    assert token_counts(small, [60_000, 480], "image", grid).tolist() == [7371, 2929]
    assert token_counts([], [], "image", grid).shape == (0,)
    assert token_counts(640, 480, "video", grid, frames=[1, 2, 3]).tolist() == [197, 393, 589]
    assert tile_counts(640, 480, "video", grid, frames=[1, 2, 3]).tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", ["image", "one_of_several", "video"])
@pytest.mark.parametrize(
    ("widths", "heights", "frames", "where", "value"),
    [
        ([640, 0], [480, 480], 1, "width of image 1", 0),
        ([640], [-3], 1, "height of image 0", -3),
        ([640], [LONGEST_SIDE + 1], 1, "height of image 0", LONGEST_SIDE + 1),
        ([640, 640], [480, 480], [1, 0], "frames of image 1", 0),
    ],
)
def test_an_impossible_size_is_refused(
    kind: MediaKind, widths: list[int], heights: list[int], frames: Any, where: str, value: int
) -> None:
    for count in (token_counts, tile_counts):
        with pytest.raises(DataError) as caught:
            count(widths, heights, kind, STAGE_GRIDS["3"], frames)
        assert str(caught.value).startswith(f"{where} = {value}: is not between 1 and {LONGEST_SIDE}; ")
        assert caught.value.remedy == "drop the sample, or repair its metadata"


def test_a_plan_of_an_impossible_size_is_refused() -> None:
    with pytest.raises(DataError, match="^width of image 0 = 0: is not between 1 and 10000000; drop the sample"):
        plan_image(0, 480, "image", STAGE_GRIDS["3"])


def test_fractions_of_pixels_are_refused() -> None:
    with pytest.raises(AssertionError, match="sizes are whole numbers, not float64"):
        token_counts([640.0], [480], "image", STAGE_GRIDS["3"])


def test_an_unknown_kind_of_medium_is_refused() -> None:
    kind: Any = "images"
    for count in (token_counts, tile_counts, plan_image):
        with pytest.raises(AssertionError, match="images"):
            count(640, 480, kind, STAGE_GRIDS["3"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 0}, "patch_size = 0: is below 1; use 14 for SigLIP-so400m"),
        ({"tile_size": 13}, "tile_size = 13: holds no patch; use 14 or more"),
        ({"cap_tiles": 0}, "cap_tiles = 0: is below 1; use 1 or more"),
        ({"max_tiles_per_side": 0}, "max_tiles_per_side = 0: is below 1; use 1 or more"),
        (
            {"tile_size": 28, "cap_tiles": 2, "max_tiles_per_side": 5},
            "max_tiles_per_side = 5: lets a cap of 2 tiles shrink the map of a long image to nothing; use 4 or less",
        ),
        ({"tiling": "square"}, "tiling = 'square': must be"),
    ],
)
def test_an_impossible_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GridConfig(**settings)
    assert str(caught.value).startswith(f"GridConfig.{message}")


def test_resolutions_are_height_and_width_in_the_public_order() -> None:
    assert STAGE_GRIDS["2a"].resolutions == [(384, 384), (384, 768), (768, 384), (768, 768)]


def test_every_pixel_lies_where_the_contract_says() -> None:
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    rows = patch_rows(images, 2)
    assert rows.shape == (2 * 2 * 3, 3 * 2 * 2)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                patch = images[image, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                assert rows[image * 6 + row * 3 + column].tolist() == patch.flatten().tolist()


def test_a_product_over_rows_is_the_convolution() -> None:
    images, weight = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    by_rows = patch_rows(images, 4) @ weight.flatten(1).T
    torch.testing.assert_close(by_rows.view(3, 4, 5), F.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2))


def test_no_image_makes_no_row() -> None:
    assert patch_rows(torch.zeros(0, 3, 28, 28), 14).shape == (0, 588)


def test_an_image_with_a_rest_is_refused() -> None:
    with pytest.raises(AssertionError, match="28x30 holds no whole 14-patches"):
        patch_rows(torch.zeros(1, 3, 28, 30), 14)
