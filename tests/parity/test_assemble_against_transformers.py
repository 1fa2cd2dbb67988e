"""Tables of assembly against transformers' LLaVA-OneVision: the same rows where it packs, shrinks or pools."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_sizes import random_sizes
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from megavlm.data.assemble_tables import assemble_table, shrunk
from megavlm.tiles import STAGE_GRIDS, GridConfig, ImagePlan, MediaKind, plan_image
from megavlm_kernels import sequence_assemble

WIDTH = 3
TOY = GridConfig(tile_size=98, max_tiles_per_side=3, cap_tiles=2)


def public_rows(plan: ImagePlan, features: Tensor, newline: Tensor) -> Tensor:
    """transformers' tokens of one image from its patch rows; its methods read nothing of the model but the sizes."""
    grid = plan.grid
    tower = SimpleNamespace(image_size=grid.tile_size, patch_size=grid.patch_size)
    pinpoints = [list(resolution) for resolution in grid.resolutions]
    model = SimpleNamespace(config=SimpleNamespace(vision_config=tower, image_grid_pinpoints=pinpoints))
    tiles = features.view(plan.tiles, grid.tokens_per_tile, WIDTH)
    if plan.kind == "video":
        pooled = LlavaOnevisionModel.apply_pooling(model, tiles)
        return torch.cat([pooled.flatten(0, 1), newline[None]])
    sizes, aspect = torch.tensor([[plan.height, plan.width]]), f"anyres_max_{grid.cap_tiles}"
    (rows,), _ = LlavaOnevisionModel.pack_image_features(model, [tiles], sizes, newline, aspect)
    return rows


def batch(plans: list[ImagePlan], gap: int = 3) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
    """(is_image, text, features, newline): text before, between and behind the images."""
    runs = [np.zeros(gap, bool)]
    for plan in plans:
        runs += [np.ones(plan.tokens, bool), np.zeros(gap, bool)]
    is_image = np.concatenate(runs)
    rows = sum(plan.patch_rows for plan in plans)
    return is_image, torch.randn(len(is_image), WIDTH), torch.randn(rows, WIDTH), torch.randn(WIDTH)


def assert_as_transformers(plans: list[ImagePlan]) -> None:
    is_image, text, features, newline = batch(plans)
    table = assemble_table(is_image, plans)
    found = sequence_assemble(text, features, newline, table.index, table.weight)
    of_plan = features.split([plan.patch_rows for plan in plans])
    expected = [public_rows(plan, rows, newline) for plan, rows in zip(plans, of_plan, strict=True)]
    assert torch.equal(found[~torch.from_numpy(is_image)], text[~torch.from_numpy(is_image)])
    torch.testing.assert_close(found[torch.from_numpy(is_image)], torch.cat(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stage", ["2a", "2b", "2c", "3"])
def test_images_of_any_size(stage: str) -> None:
    torch.manual_seed(0)
    sizes = zip(*(sides.tolist() for sides in random_sizes(24, seed=11)), strict=True)
    plans = [plan_image(width, height, "image", STAGE_GRIDS[stage]) for width, height in sizes]
    assert any(plan.is_shrunk for plan in plans) or stage == "2a"
    assert_as_transformers(plans)


@pytest.mark.parametrize("kind", ["image", "one_of_several", "video"])
@pytest.mark.parametrize(("width", "height"), [(250, 251), (90, 90), (1, 60), (400, 99)])
def test_each_kind_alone(kind: MediaKind, width: int, height: int) -> None:
    torch.manual_seed(0)
    assert_as_transformers([plan_image(width, height, kind, TOY, frames=5 if kind == "video" else 1)])


def test_kinds_mixed_in_one_batch() -> None:
    torch.manual_seed(0)
    kinds: list[MediaKind] = ["one_of_several", "image", "video", "one_of_several", "image"]
    plans = [plan_image(250, 200 + 40 * number, kind, TOY) for number, kind in enumerate(kinds)]
    assert [plan.is_shrunk for plan in plans] == [False, True, False, False, True]
    assert_as_transformers(plans)


@pytest.mark.parametrize("size", [(27, 14), (81, 66), (162, 140), (75, 60), (28, 1), (3, 2)])
def test_weights_of_a_shrunk_line_are_pytorchs(size: tuple[int, int]) -> None:
    length, short = size
    rows, weights = shrunk(np.arange(length)[:, None], short, 1)
    values = torch.rand(length)
    found = (values[torch.from_numpy(rows)] * torch.from_numpy(weights)).sum(1)
    expected = F.interpolate(values[None, None, :, None], (short, 1), mode="bilinear").flatten()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
