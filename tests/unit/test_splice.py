"""Media at full length in a sample's tokens, written out; cutting, patch rows, packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megavlm.batch import IGNORED, next_token_batch
from megavlm.data.assemble_tables import assemble_table
from megavlm.data.chat import Encoded
from megavlm.data.splice import (
    Medium,
    SplicedSample,
    cut_sample,
    pack_samples,
    patch_rows_of,
    spliced_sample,
)
from megavlm.data.tile_images import tile_pixels
from megavlm.errors import DataError
from megavlm.tiles import STAGE_GRIDS, GridConfig, plan_image
from megavlm_kernels import sequence_assemble

GRID = GridConfig(tile_size=28, max_tiles_per_side=2, cap_tiles=4)
IMAGE, VIDEO = 91, 92
SQUARE = Medium("image", 28, 28)
CLIP = Medium("video", 40, 30, frames=3)


def spliced(tokens: list[int], *media: Medium, grid: GridConfig = GRID) -> SplicedSample:
    """A sample in which all tokens from 50 to 90 are trained."""
    ids = np.array(tokens)
    targets = np.where((ids >= 50) & (ids <= 90), ids, IGNORED)
    return spliced_sample(Encoded(ids, targets), media, grid, IMAGE, VIDEO, "sample 7")


def test_an_image_alone() -> None:
    """A base tile of 4 tokens, and a map of 2 rows of 2, each closed by a newline."""
    sample = spliced([1, IMAGE, 2, 60, 61], SQUARE)
    assert sample.tokens.tolist() == [1, *[IMAGE] * 10, 2, 60, 61]
    assert sample.targets.tolist() == [*[IGNORED] * 12, 60, 61]
    assert sample.is_image.tolist() == [False, *[True] * 10, False, False, False]
    assert [plan.kind for plan in sample.plans] == ["image"] and sample.target_tokens == 2


def test_several_images_cost_a_tile_and_a_newline_each() -> None:
    sample = spliced([IMAGE, 60, IMAGE, 61], Medium("image", 500, 20), SQUARE)
    assert sample.tokens.tolist() == [*[IMAGE] * 5, 60, *[IMAGE] * 5, 61]
    assert [(plan.kind, plan.width) for plan in sample.plans] == [("one_of_several", 500), ("one_of_several", 28)]


def test_a_video_costs_its_pooled_frames_and_a_newline() -> None:
    sample = spliced([VIDEO, 60], CLIP)
    assert sample.tokens.tolist() == [*[VIDEO] * 4, 60] and sample.is_image.tolist() == [*[True] * 4, False]
    assert sample.plans == (plan_image(40, 30, "video", GRID, 3),)


def test_media_of_both_kinds_follow_their_own_tags() -> None:
    """Videos don't count as images: the image is alone."""
    sample = spliced([VIDEO, 1, IMAGE, 2, VIDEO], SQUARE, CLIP, Medium("video", 5, 5))
    assert [plan.kind for plan in sample.plans] == ["video", "image", "video"]
    assert sample.order == (1, 0, 2)
    assert sample.tokens.tolist() == [*[VIDEO] * 4, 1, *[IMAGE] * 10, 2, *[VIDEO] * 2]


def test_text_alone() -> None:
    sample = spliced([1, 60, 2])
    assert sample.tokens.tolist() == [1, 60, 2] and sample.plans == () and not sample.is_image.any()
    assert patch_rows_of(sample, []).shape == (0, 588)


def test_stage_1_has_no_newlines() -> None:
    assert spliced([IMAGE], Medium("image", 800, 300), grid=STAGE_GRIDS["1"]).is_image.sum() == 729


def test_the_first_token_is_no_target() -> None:
    assert spliced([60, 61, 1]).target_tokens == 1


@pytest.mark.parametrize(
    ("tokens", "media", "problem"),
    [
        ([IMAGE, 1], [], r"sample 7: <image> tags = 1: 0 images come with them; write <image> once for each image"),
        ([1], [SQUARE], r"sample 7: <image> tags = 0: 1 images come"),
        ([IMAGE], [CLIP], r"sample 7: <image> tags = 1: 0 images come"),
        ([VIDEO, VIDEO], [CLIP], r"sample 7: <video> tags = 2: 1 videos come"),
        ([IMAGE], [Medium("image", 0, 5)], r"sample 7: medium 0: width of image 0 = 0: is not between"),
        ([IMAGE, VIDEO], [CLIP, Medium("image", 5, -1)], r"sample 7: medium 1: height of image 0 = -1"),
        ([VIDEO], [Medium("video", 5, 5, 5_000_000)], r"sample 7: tokens = 5000001: are more than 4194304"),
    ],
)
def test_samples_that_contradict_themselves(tokens: list[int], media: list[Medium], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        spliced(tokens, *media)


def test_a_tokenizer_without_videos() -> None:
    encoded = Encoded(np.array([IMAGE, 1]), np.array([IGNORED, 1]))
    assert spliced_sample(encoded, [SQUARE], GRID, IMAGE, None).is_image.sum() == 10
    with pytest.raises(DataError, match="<video> tags = 0: 1 videos"):
        spliced_sample(encoded, [SQUARE, CLIP], GRID, IMAGE, None)


# --- cutting --------------------------------------------------------------------------------------------------------


def test_text_is_cut_behind_the_last_image() -> None:
    sample = spliced([1, IMAGE, 2, 60, 61], SQUARE)
    for length in (11, 13):
        cut = cut_sample(sample, length)
        assert cut.tokens.tolist() == sample.tokens[:length].tolist() and cut.plans == sample.plans
        assert len(cut.targets) == len(cut.is_image) == length
    assert cut_sample(sample, 13).target_tokens == 1
    assert cut_sample(sample, 14) is sample


@pytest.mark.parametrize("length", [1, 5, 10])
def test_an_image_is_never_cut(length: int) -> None:
    with pytest.raises(DataError, match=rf"sample 7: max_tokens = {length}: its images and videos need 11"):
        cut_sample(spliced([1, IMAGE, 2, 60], SQUARE), length)


def test_an_image_is_never_cut_off() -> None:
    with pytest.raises(DataError, match=r"max_tokens = 6: its images and videos need 12"):
        cut_sample(spliced([IMAGE, 1, 2, IMAGE, 60], SQUARE, SQUARE), 6)


# --- pixels ---------------------------------------------------------------------------------------------------------


def test_patch_rows_lie_in_the_order_of_the_tags() -> None:
    draw = np.random.default_rng(3)
    sample = spliced([VIDEO, IMAGE, IMAGE], Medium("image", 9, 50), SQUARE, CLIP)
    first, second, clip = (
        draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((50, 9), (28, 28), (3, 30, 40))
    )
    found = patch_rows_of(sample, [first, second, clip])
    expected = [tile_pixels(plan, pixels) for plan, pixels in zip(sample.plans, (clip, first, second), strict=True)]
    assert torch.equal(found, torch.cat(expected)) and found.shape == (
        sum(plan.tiles for plan in sample.plans) * 4,
        588,
    )


@pytest.mark.parametrize("shape", [(30, 28, 3), (28, 28, 4), (2, 28, 28, 3)])
def test_pixels_of_another_size_than_the_metadatas(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"sample 7: shape of medium 0.*\(28, 28, 3\).*a file has changed"):
        patch_rows_of(spliced([IMAGE], SQUARE), [np.zeros(shape, np.uint8)])


# --- packing --------------------------------------------------------------------------------------------------------


def test_a_row_by_hand() -> None:
    samples = [spliced([1, 60, 61]), spliced([IMAGE, 62, 2], SQUARE)]
    row = pack_samples(samples, 18, padding_id=9)
    assert row.tokens.tolist() == [[1, 60, 61, *[IMAGE] * 10, 62, 2, 9, 9, 9]]
    assert row.targets.tolist() == [[IGNORED, 60, 61, *[IGNORED] * 10, 62, *[IGNORED] * 4]]
    assert row.cu_seqlens.tolist() == [0, 3, 15, 18] and row.cu_seqlens.dtype == torch.int32
    assert np.flatnonzero(row.is_image).tolist() == list(range(3, 13)) and row.plans == samples[1].plans
    batch = next_token_batch(row.tokens, row.targets, row.cu_seqlens)
    assert torch.equal(batch.loss_weights.nonzero(), torch.tensor([[0, 0], [0, 1], [0, 12]]))
    assert batch.labels[0, [0, 1, 12]].tolist() == [60, 61, 62]


@pytest.mark.parametrize("length", [None, 200])
def test_a_row_counts_what_its_samples_count(length: int | None) -> None:
    """Each sample ends in a target that nothing but its own last-but-one token predicts."""
    samples = [
        spliced([60, IMAGE, 61, 62], SQUARE),
        spliced([63]),
        spliced([64, 65]),
        spliced([IMAGE, VIDEO, 66], SQUARE, CLIP),
    ]
    row = pack_samples(samples, length)
    batch = next_token_batch(row.tokens, row.targets, row.cu_seqlens)
    assert int(batch.target_tokens) == sum(sample.target_tokens for sample in samples) == 4
    assert batch.tokens.size(1) == (length or sum(len(sample.tokens) for sample in samples))


def test_padding_alone_and_rows_that_are_full() -> None:
    row = pack_samples([], 5)
    assert row.cu_seqlens.tolist() == [0, 5]
    assert int(next_token_batch(row.tokens, row.targets, row.cu_seqlens).target_tokens) == 0
    assert pack_samples([spliced([1, 2])], 2).cu_seqlens.tolist() == [0, 2]
    with pytest.raises(AssertionError, match="2 tokens in a row of 1"):
        pack_samples([spliced([1, 2])], 1)


def test_a_row_is_assembled_from_its_media() -> None:
    """Features that are the numbers of their patch rows come back in the order of the tags."""
    samples = [spliced([1, VIDEO, IMAGE, 2], SQUARE, CLIP), spliced([IMAGE, 3], Medium("image", 28, 14))]
    row = pack_samples(samples, 40)
    table = assemble_table(row.is_image, row.plans)
    patches = sum(plan.patch_rows for plan in row.plans)
    features = torch.arange(patches, dtype=torch.float32)[:, None].repeat(1, 2)
    text = torch.full((40, 2), -7.0)
    found = sequence_assemble(text, features, torch.full((2,), -1.0), table.index, table.weight)[:, 0]
    assert (found[~torch.from_numpy(row.is_image)] == -7).all()
    # A frame's four patches become their mean; the newline of the video; then the image's base tile.
    assert found[1:9].tolist() == [1.5, 5.5, 9.5, -1, 12, 13, 14, 15]
