"""The image-token contract against transformers' LLaVA-OneVision: counts, maps, tiles and pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_sizes import random_sizes
from torch import Tensor
from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from megavlm.data.tile_images import Pixels, cut_tiles, tile_pixels
from megavlm.tiles import (
    STAGE_GRIDS,
    GridConfig,
    ImagePlan,
    MediaKind,
    patch_rows,
    plan_image,
    split_images,
    token_counts,
)

GRID_STAGES = ("2a", "2b", "2c", "3", "4")
TOY_GRIDS = [GridConfig(tile_size=98, max_tiles_per_side=side, cap_tiles=cap) for side, cap in [(2, 4), (3, 5), (6, 9)]]
NEWLINE = -1.0
IMAGE_TOKEN, VIDEO_TOKEN = 30, 31


def pinpoints(grid: GridConfig) -> list[list[int]]:
    return [list(resolution) for resolution in grid.resolutions]


def public_image_processor(grid: GridConfig) -> LlavaOnevisionImageProcessorPil:
    size = {"height": grid.tile_size, "width": grid.tile_size}
    half = [0.5, 0.5, 0.5]
    return LlavaOnevisionImageProcessorPil(
        size=size, image_grid_pinpoints=pinpoints(grid), image_mean=half, image_std=half
    )


def public_processor(grid: GridConfig) -> LlavaOnevisionProcessor:
    """transformers' processor as far as it counts; its constructor asks for a tokenizer, and for torchvision."""
    processor = object.__new__(LlavaOnevisionProcessor)
    processor.image_processor = public_image_processor(grid)
    processor.num_image_tokens = grid.tokens_per_tile
    processor.vision_aspect_ratio = f"anyres_max_{grid.cap_tiles}"
    processor.vision_feature_select_strategy = "full"
    return processor


def public_model(grid: GridConfig) -> LlavaOnevisionModel:
    """A model so small that only its shapes matter."""
    torch.manual_seed(0)
    tower = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=grid.tile_size,
        patch_size=grid.patch_size,
        vision_use_head=False,
    )
    decoder = Qwen2Config(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=32,
        max_position_embeddings=32768,
    )
    config = LlavaOnevisionConfig(
        vision_config=tower,
        text_config=decoder,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        image_grid_pinpoints=pinpoints(grid),
        vision_aspect_ratio=f"anyres_max_{grid.cap_tiles}",
        vision_feature_layer=-1,
    )
    return LlavaOnevisionModel(config).eval()


@pytest.mark.parametrize("stage", GRID_STAGES)
def test_counts_of_100_000_sizes(stage: str) -> None:
    grid = STAGE_GRIDS[stage]
    processor = public_processor(grid)
    widths, heights = random_sizes(100_000, seed=1)
    sizes = zip(heights.tolist(), widths.tolist(), strict=True)
    expected = [processor._get_number_of_features(*size, grid.tile_size, grid.tile_size) for size in sizes]
    different = np.flatnonzero(token_counts(widths, heights, "image", grid) != expected)
    assert not different.size, f"{widths[different[0]]}x{heights[different[0]]} and {different.size - 1} more"


@pytest.mark.parametrize("stage", GRID_STAGES)
def test_maps_differ_from_llava_nexts_only_by_its_float_noise(stage: str) -> None:
    """LLaVA-NeXT takes the whole part of a float; where the exact quotient is whole, it may be one short."""
    grid = STAGE_GRIDS[stage]
    width, height = random_sizes(100_000, seed=1)
    split = split_images(width, height, grid)
    rows, columns = split.rows * grid.tokens_per_side, split.columns * grid.tokens_per_side
    is_wider = width / height > columns / rows
    by_floats = np.where(is_wider, height * (columns / width), width * (rows / height)).astype(np.int64)
    is_whole = np.where(is_wider, height * columns % width, width * rows % height) == 0
    theirs = (np.where(is_wider, rows, columns) - by_floats) // 2
    differs = np.where(is_wider, split.first_map_row, split.first_map_column) != theirs
    assert not (differs & ~is_whole).any()
    assert 0 < differs.sum() < 50


@pytest.mark.parametrize("stage", GRID_STAGES)
def test_the_model_makes_of_1500_sizes_the_map_that_the_plan_says(stage: str) -> None:
    """The features are the numbers of their patch rows, so the order is compared and not only the number."""
    grid = STAGE_GRIDS[stage]
    model = public_model(grid)
    newline = torch.tensor([NEWLINE])
    shrunk = 0
    for width, height in zip(*(sides.tolist() for sides in random_sizes(1500, seed=6)), strict=True):
        plan = plan_image(width, height, "image", grid)
        numbers = torch.arange(plan.patch_rows, dtype=torch.float32).view(plan.tiles, grid.tokens_per_tile, 1)
        aspect = model.config.vision_aspect_ratio
        sizes = torch.tensor([[height, width]])
        (features,), lengths = model.pack_image_features([numbers], sizes, newline, aspect)
        assert lengths.tolist() == [plan.tokens], (width, height)
        assert torch.equal(features[:, 0], tokens_of(plan)), (width, height)
        shrunk += plan.is_shrunk
    assert shrunk > 50 or stage == "2a", "few sizes reached the cap"


def tokens_of(plan: ImagePlan) -> Tensor:
    """The plan's tokens where each feature is the number of its patch row."""
    assert plan.split is not None
    feature_map = torch.from_numpy(plan.map_patch_rows()).float()
    if plan.is_shrunk:
        size = (plan.split.token_rows, plan.split.token_columns)
        feature_map = F.interpolate(feature_map[None, None], size, mode="bilinear")[0, 0]
    closed = F.pad(feature_map, (0, 1), value=NEWLINE)
    return torch.cat([torch.arange(plan.grid.tokens_per_tile, dtype=torch.float32), closed.flatten()])


@pytest.mark.parametrize("grid", TOY_GRIDS, ids=lambda grid: f"{grid.max_tiles_per_side}x{grid.max_tiles_per_side}")
def test_the_model_consumes_the_tokens_counted(grid: GridConfig) -> None:
    """transformers refuses ids whose image tokens are not as many as the features it makes of the pixels."""
    processor, model = public_image_processor(grid), public_model(grid)
    draw = np.random.default_rng(7)
    sizes = [(49, 49), (400, 99), (30, 300), (1, 60), (250, 251), (120, 1)]
    images = [draw.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
    samples = [[image] for image in images[:4]] + [images[4:]]
    pixels = processor(samples, return_tensors="pt")
    counts = [plan_image(*size, "image", grid).tokens for size in sizes[:4]]
    counts += [plan_image(*size, "one_of_several", grid).tokens for size in sizes[4:]]

    def run(image_tokens: int) -> None:
        model(input_ids=torch.full((1, image_tokens), IMAGE_TOKEN), **pixels)

    with torch.no_grad():
        run(sum(counts))
        with pytest.raises(ValueError, match="do not match"):
            run(sum(counts) + 1)
        made = model.get_image_features(pixels.pixel_values, pixels.image_sizes, batch_num_images=[1, 1, 1, 1, 2])
    assert [len(features) for features in made.pooler_output] == counts


@pytest.mark.parametrize("frames", [1, 5])
def test_the_model_consumes_the_tokens_of_a_video(frames: int) -> None:
    grid = STAGE_GRIDS["3"]
    with torch.no_grad():
        made = public_model(grid).get_video_features(torch.zeros(1, frames, 3, grid.tile_size, grid.tile_size))
    assert made.pooler_output.shape[1] == plan_image(640, 480, "video", grid, frames).tokens


def test_stages_with_a_grid_count_one_of_several_as_the_processor_does() -> None:
    for stage in GRID_STAGES:
        inputs = {"batch_num_images": [2], "image_sizes": [[480, 640], [1, 1]]}
        processor = public_processor(STAGE_GRIDS[stage])
        processor.image_token = "i"
        counts = [len(processor.replace_image_token(inputs, index)) for index in (0, 1)]
        assert token_counts([640, 1], [480, 1], "one_of_several", STAGE_GRIDS[stage]).tolist() == counts


@pytest.mark.parametrize(
    ("grid", "images", "longest"), [(TOY_GRIDS[0], 20, 400), (TOY_GRIDS[2], 26, 800), (STAGE_GRIDS["2b"], 4, 1400)]
)
@pytest.mark.parametrize("kind", ["image", "one_of_several"])
def test_pixels_equal_the_public_processors(grid: GridConfig, images: int, longest: int, kind: MediaKind) -> None:
    processor = public_image_processor(grid)
    draw = np.random.default_rng(8)
    for index in range(images):
        width, height = (1, int(draw.integers(1, longest))) if index == 0 else draw.integers(1, longest, 2).tolist()
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        samples = [[pixels]] if kind == "image" else [[pixels, pixels[:1, :1]]]
        # Left to guess, it takes an image 1, 3 or 4 pixels high for one with its channels first.
        expected = processor(samples, input_data_format="channels_last", return_tensors="pt").pixel_values[0]
        plan = plan_image(width, height, kind, grid)
        assert len(expected) == plan.tiles, (width, height)
        used = grid.tokens_per_side * grid.patch_size
        rows = patch_rows(expected[:, :, :used, :used], grid.patch_size)
        assert torch.equal(tile_pixels(plan, pixels), rows), (width, height)


def test_patch_rows_through_the_towers_weight_are_its_patch_embedding() -> None:
    """The tower's convolution leaves out the same last pixels, and takes patches in the same order."""
    grid = STAGE_GRIDS["2a"]
    model = public_model(grid)
    pixels = np.random.default_rng(9).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    seen = public_image_processor(grid)([[pixels]], return_tensors="pt").pixel_values[0]
    convolution = model.vision_tower.embeddings.patch_embedding
    expected = convolution(seen).flatten(2).transpose(1, 2).flatten(0, 1)
    rows = tile_pixels(plan_image(500, 300, "image", grid), pixels)
    torch.testing.assert_close(rows @ convolution.weight.flatten(1).T + convolution.bias, expected, atol=1e-5, rtol=0)


def test_a_stage_of_single_tiles_squeezes_the_image_as_the_base_tile() -> None:
    pixels = np.random.default_rng(10).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    single = cut_tiles(plan_image(500, 300, "image", STAGE_GRIDS["1"]), pixels)
    base = cut_tiles(plan_image(500, 300, "image", STAGE_GRIDS["2a"]), pixels)[:1]
    frames = cut_tiles(plan_image(500, 300, "video", STAGE_GRIDS["2a"], frames=2), np.stack([pixels, pixels[::-1]]))
    assert single.shape == (1, 384, 384, 3) and np.array_equal(single, base)
    assert np.array_equal(frames[:1], base) and frames.shape == (2, 384, 384, 3)
    assert not np.array_equal(frames[0], frames[1])


def test_another_decoders_resize_is_used_for_every_tile() -> None:
    def grey(pixels: Pixels, width: int, height: int) -> Pixels:
        return np.full((height, width, 3), 128, np.uint8)

    tiles = cut_tiles(plan_image(100, 50, "image", TOY_GRIDS[0]), np.zeros((50, 100, 3), np.uint8), grey)
    assert tiles.shape == (3, 98, 98, 3) and (tiles == 128).all()


def test_pixels_of_another_size_than_the_plans_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"\(50, 99, 3\)"):
        cut_tiles(plan_image(100, 50, "image", TOY_GRIDS[0]), np.zeros((50, 99, 3), np.uint8))
    with pytest.raises(AssertionError, match="2 frames where the plan has 3"):
        cut_tiles(plan_image(100, 50, "video", TOY_GRIDS[0], frames=3), np.zeros((2, 50, 100, 3), np.uint8))
