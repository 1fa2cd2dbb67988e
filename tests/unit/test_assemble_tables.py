"""Tables that packed rows are assembled by: columns, newlines, slices of positions, batches without images."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from megavlm.data.assemble_tables import assemble_table, image_sources
from megavlm.tiles import STAGE_GRIDS, GridConfig, MediaKind, plan_image
from megavlm_kernels import sequence_assemble

TOY = GridConfig(tile_size=28, max_tiles_per_side=3, cap_tiles=2)


def test_a_row_by_hand() -> None:
    """An image of 28x14 pixels: a base tile of 2x2 patches, and of its grid of one tile a map of one row."""
    plan = plan_image(28, 14, "image", GridConfig(tile_size=42, max_tiles_per_side=1))
    assert plan.split is not None and (plan.split.map_rows, plan.split.map_columns, plan.tokens) == (1, 3, 13)
    is_image = np.array([False, *[True] * 13, False])
    table = assemble_table(is_image, [plan])
    # 15 rows of text; patch row 9 + 3 is the middle row of the second tile; the newline stands behind 18 patch rows.
    expected = [0, *range(15, 24), 15 + 12, 15 + 13, 15 + 14, 15 + 18, 14]
    assert table.index[:, 0].tolist() == expected and table.weight is None and table.index.dtype == torch.int32


def test_weights_of_every_token_sum_to_one() -> None:
    for width, height in ((2000, 2000), (900, 1000)):
        plan = plan_image(width, height, "image", STAGE_GRIDS["2b"])
        assert plan.is_shrunk
        rows, weights = image_sources(plan)
        assert rows.shape == weights.shape == (plan.tokens, 4)
        assert np.abs(weights.sum(1) - 1).max() < 1e-6 and rows.min() == -1 and rows.max() == plan.patch_rows


def test_an_empty_map_leaves_the_base_tile() -> None:
    plan = plan_image(1, 200, "image", TOY)
    rows, _ = image_sources(plan)
    assert plan.split is not None and plan.split.map_columns == 0
    expected = [*range(4), *[plan.patch_rows] * plan.split.token_rows]
    assert rows[:, 0].tolist() == expected and len(rows) == plan.tokens


@pytest.mark.parametrize("kind", ["image", "one_of_several", "video"])
def test_single_tiles_have_no_newline(kind: MediaKind) -> None:
    plan = plan_image(50, 40, kind, GridConfig(tile_size=42, tiling="single"), frames=2 if kind == "video" else 1)
    rows, _ = image_sources(plan)
    assert len(rows) == plan.tokens and rows.max() == plan.patch_rows - 1


def test_a_batch_without_images_is_its_text() -> None:
    table = assemble_table(np.zeros(7, bool), [])
    assert table.index.tolist() == [[number] for number in range(7)] and table.weight is None


@pytest.mark.parametrize("size", [(200, 200), (28, 28)], ids=str)
def test_slices_take_the_text_of_their_positions_alone(size: tuple[int, int]) -> None:
    """As sequence-parallel ranks assemble: one behind another, they are the whole."""
    plan = plan_image(*size, "image", TOY)
    is_image = np.zeros(plan.tokens + 9, bool)
    is_image[4 : 4 + plan.tokens] = True
    text, features, newline = torch.randn(len(is_image), 5), torch.randn(plan.patch_rows, 5), torch.randn(5)
    table = assemble_table(is_image, [plan])
    assert (table.weight is not None) == plan.is_shrunk
    whole = sequence_assemble(text, features, newline, table.index, table.weight)
    cuts, parts = [0, 3, 11, len(is_image)], []
    for first, end in pairwise(cuts):
        part = table.slice(first, end - first)
        parts.append(sequence_assemble(text[first:end], features, newline, part.index, part.weight))
    assert torch.equal(torch.cat(parts), whole)


def test_positions_of_another_number_than_the_tokens_are_refused() -> None:
    plan = plan_image(28, 28, "image", TOY)
    with pytest.raises(AssertionError, match=f"3 positions for the {plan.tokens} tokens"):
        assemble_table(np.ones(3, bool), [plan])
