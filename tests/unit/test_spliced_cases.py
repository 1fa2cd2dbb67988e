"""Cases of Aquila-VL: drawn by a seed, and refused before anything is computed where their tensors fit nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_aquila import GRIDS, IMAGE, TILE, VIDEO
from torch import Tensor

from megavlm.build.run_config import AquilaVLConfig, DecoderConfig, RunConfig
from megavlm.errors import DataError
from megavlm.infer.cases import Case, case_batches, check_cases
from megavlm.infer.record import random_rows
from megavlm.model.towers.siglip_config import SiglipConfig
from megavlm.tiles import plan_image

DECODER = DecoderConfig(
    num_layers=1,
    hidden_size=8,
    ffn_hidden_size=8,
    num_attention_heads=1,
    num_query_groups=1,
    kv_channels=8,
    vocab_size=120,
)
TOWER = SiglipConfig(image_size=TILE, width=8, depth=1, heads=1, mlp_width=8)
RUN = RunConfig(
    name="tiny",
    decoder=DECODER,
    aquila_vl=AquilaVLConfig(tower=TOWER, grid=GRIDS["2b"], image_token_id=IMAGE, video_token_id=VIDEO),
)
HEIGHT, WIDTH = 90, 150
PLAN = plan_image(WIDTH, HEIGHT, "image", GRIDS["2b"])
LENGTH = PLAN.tokens + 2
PICTURES = torch.rand(1, PLAN.tiles, 3, TILE, TILE)
VIDEOS = torch.rand(1, 2, 3, TILE, TILE)


def good_case() -> Case:
    """A row with an image, and one with a video."""
    rows = torch.full((2, LENGTH), 7)
    rows[0, 1:-1] = IMAGE
    rows[1, 1 : 2 * GRIDS["2b"].tokens_per_frame + 2] = VIDEO
    media = {"pixel_values": PICTURES, "image_sizes": torch.tensor([[HEIGHT, WIDTH]]), "pixel_values_videos": VIDEOS}
    deals = {"batch_num_images": torch.tensor([1, 0]), "batch_num_videos": torch.tensor([0, 1])}
    return Case(rows, labels=rows, loss=torch.ones(1), tensors=media | deals)


def refusal(case: Case) -> str:
    with pytest.raises(DataError) as caught:
        check_cases({"one": case}, "file", RUN)
        case_batches(case, RUN)
    return str(caught.value)


def test_a_good_case_is_taken() -> None:
    case = good_case()
    check_cases({"one": case}, "file", RUN)
    first, second = case_batches(replace(case, input_ids=case.input_ids.int()), RUN)
    assert first.media is not None and second.media is not None
    assert first.media.tiles == (PLAN.tiles,) and second.media.tiles == (2,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.ones(5, dtype=torch.int64)}, "one.input_ids = (5,): should be [rows, length]"),
        ({"input_ids": good_case().input_ids.float()}, f"one.input_ids = ((2, {LENGTH}), 'torch.float32'): should be"),
        (
            {"labels": good_case().input_ids[:, 1:]},
            f"one.labels = ((2, {LENGTH - 1}), 'torch.int64'): should be (2, {LENGTH})",
        ),
        ({"labels": good_case().input_ids + 30}, "one.labels = 131: are not all within the vocabulary of 120"),
        ({"labels": torch.full((2, LENGTH), -5)}, "one.labels = -5: are not all within"),
        ({"attention_mask": torch.ones(2, 5, dtype=torch.int64)}, "one.attention_mask = ((2, 5), 'torch.int64')"),
        ({"attention_mask": torch.zeros(2, LENGTH, dtype=torch.int64)}, "leaves nothing to compare"),
        ({"loss": torch.zeros(1)}, "one.loss = [0.0]: should be one positive number"),
        ({"loss": torch.ones(2)}, "one.loss = [1.0, 1.0]: should be one positive number"),
    ],
)
def test_tokens_that_fit_nothing(changes: dict[str, Any], message: str) -> None:
    assert message in refusal(replace(good_case(), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": PICTURES[0]}, f"one.pixel_values = ({PLAN.tiles}, 3, 98, 98): are no normalised pictures"),
        ({"pixel_values": PICTURES[..., :84, :84]}, f"(1, {PLAN.tiles}, 3, 84, 84): are no normalised pictures"),
        ({"pixel_values": PICTURES.int()}, "are no normalised pictures"),
        ({"pixel_values": PICTURES[:, :1]}, f"row 0: tiles in pixel_values = 1: an image of 150x90 has {PLAN.tiles}"),
        ({"pixel_values": None}, "row 0: token 1 = 100: no image is left for it"),
        ({"image_sizes": None}, "one.image_sizes = None: should be (1, 2)"),
        ({"image_sizes": torch.tensor([HEIGHT, WIDTH])}, "one.image_sizes = (2,): should be (1, 2)"),
        ({"image_sizes": torch.tensor([[20, 20]])}, "row 0: token 106 = 100: no image is left for it"),
        ({"batch_num_images": None}, "one.batch_num_images = [1]: does not deal 1 of them to 2 rows"),
        ({"batch_num_images": torch.tensor([2, -1])}, "[2, -1]: does not deal 1 of them to 2 rows"),
        ({"batch_num_images": torch.tensor([1])}, "[1]: does not deal 1 of them to 2 rows"),
        ({"batch_num_images": torch.tensor([[1, 0]])}, "[[1, 0]]: does not deal"),
        ({"pixel_values_videos": VIDEOS[0]}, "one.pixel_values_videos = (2, 3, 98, 98): are no normalised"),
        ({"pixel_values_videos": VIDEOS[:, :1]}, "no image is left for it"),
        ({"batch_num_videos": torch.tensor([0, 7])}, "[0, 7]: does not deal 1 of them to 2 rows"),
    ],
)
def test_media_that_fit_nothing(changes: dict[str, Any], message: str) -> None:
    case = good_case()
    kept = {name: tensor for name, tensor in (case.tensors | changes).items() if tensor is not None}
    assert message in refusal(replace(case, tensors=kept))


def test_drawn_cases_follow_the_seed_alone() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        torch.rand(seed)  # whatever else was drawn before
        return random_rows(RUN, random.Random(seed), [[(20, 30)]], frames=[2])

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("pixel_values", "pixel_values_videos"):
        assert not torch.equal(first[name], other[name]), name
    assert not torch.equal(first["labels"] == -100, other["labels"] == -100)
