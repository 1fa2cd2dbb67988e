"""Samples from conversation and pixels to the model's inputs, against transformers' LLaVA-OneVision processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import qwen_hf
import torch
from torch import Tensor

from megavlm.batch import IGNORED
from megavlm.data.chat import encode_chatml
from megavlm.data.sample import Turn
from megavlm.data.splice import Medium, SplicedSample, patch_rows_of, spliced_sample
from megavlm.data.tile_images import Pixels
from megavlm.data.tokenizer import Tokenizer
from megavlm.tiles import STAGE_GRIDS, GridConfig, patch_rows

TOY = GridConfig(tile_size=98, max_tiles_per_side=3, cap_tiles=5)
ANSWER = "A red square."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_hf.write_tokenizer(tmp_path_factory.mktemp("qwen"))


def noise(*shape: int) -> Pixels:
    return np.random.default_rng(shape).integers(0, 256, (*shape, 3), dtype=np.uint8)


def medium(pixels: Pixels) -> Medium:
    *frames, height, width, _ = pixels.shape
    return Medium("video", width, height, *frames) if frames else Medium("image", width, height)


def our_sample(questions: Sequence[str], media: Sequence[Pixels], grid: GridConfig, folder: Path) -> SplicedSample:
    tokenizer = Tokenizer(folder)
    said = [turn for question in questions for turn in (Turn("user", question), Turn("assistant", ANSWER))]
    encoded = encode_chatml(said, tokenizer, "released")
    image, video = tokenizer.token_of("<image>"), tokenizer.token_of("<video>")
    assert image is not None
    return spliced_sample(encoded, [medium(pixels) for pixels in media], grid, image, video)


def public_inputs(
    questions: Sequence[str], images: Sequence[Pixels], videos: Sequence[Pixels], grid: GridConfig
) -> tuple[list[int], Tensor, Tensor]:
    """(token ids, patch rows of the images, those of the videos)."""
    processor = qwen_hf.public_processor(grid, qwen_hf.tiny_tokenizer())
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    for question in questions:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]
    made = processor(
        text=[processor.tokenizer.apply_chat_template(messages, tokenize=False)],
        images=[list(images)] if images else None,
        videos=list(videos) or None,
        # Left to guess, it takes an image of few rows for one with its channels first.
        images_kwargs={"input_data_format": "channels_last"},
    )
    used = grid.tokens_per_side * grid.patch_size
    rows = []
    for name in ("pixel_values", "pixel_values_videos"):
        tiles = [torch.as_tensor(np.asarray(one))[:, :, :used, :used] for one in made.get(name, [])]
        rows.append(torch.cat([torch.empty(0, 588), *(patch_rows(part, grid.patch_size) for part in tiles)]))
    return made["input_ids"][0], rows[0], rows[1]


@pytest.mark.parametrize("size", [(50, 80), (98, 98), (1, 30), (200, 3), (300, 290)])
def test_an_image(size: tuple[int, int], folder: Path) -> None:
    question, image = ["<image>\nWhat is in the picture?"], noise(*size)
    tokens, rows, _ = public_inputs(question, [image], [], TOY)
    sample = our_sample(question, [image], TOY, folder)
    assert sample.tokens.tolist() == tokens
    assert torch.equal(patch_rows_of(sample, [image]), rows)


def test_an_image_at_the_released_models_size(folder: Path) -> None:
    question, image, grid = ["<image>\nWhat?"], noise(500, 900), STAGE_GRIDS["3"]
    tokens, rows, _ = public_inputs(question, [image], [], grid)
    sample = our_sample(question, [image], grid, folder)
    assert sample.tokens.tolist() == tokens and len(rows) == 7 * 729
    assert torch.equal(patch_rows_of(sample, [image]), rows)


def test_several_images_over_several_turns(folder: Path) -> None:
    questions = ["left <image> or right <image>?", "And this?", "<image>\nThis."]
    images = [noise(50, 80), noise(1, 30), noise(300, 90)]
    tokens, rows, _ = public_inputs(questions, images, [], TOY)
    sample = our_sample(questions, images, TOY, folder)
    assert sample.tokens.tolist() == tokens and {plan.kind for plan in sample.plans} == {"one_of_several"}
    # transformers pads to as many tiles as the longest: one.
    assert torch.equal(patch_rows_of(sample, images), rows)


def test_text_alone(folder: Path) -> None:
    questions = ["What is it?", "And\n\nthat?\n"]
    assert our_sample(questions, [], TOY, folder).tokens.tolist() == public_inputs(questions, [], [], TOY)[0]


@pytest.mark.parametrize("frames", [1, 4])
def test_a_video(frames: int, folder: Path) -> None:
    question, video = ["<video>\nWhat happens?"], noise(frames, 60, 90)
    tokens, _, rows = public_inputs(question, [], [video], TOY)
    sample = our_sample(question, [video], TOY, folder)
    assert sample.tokens.tolist() == tokens
    assert torch.equal(patch_rows_of(sample, [video]), rows)


@pytest.mark.parametrize("images", [1, 2])
def test_a_video_does_not_count_as_an_image(images: int, folder: Path) -> None:
    questions = ["<video> or " + "<image>" * images + "?", "<video>\nAgain?"]
    pictures = [noise(50 + number, 80) for number in range(images)]
    videos = [noise(2, 60, 90), noise(3, 20, 30)]
    tokens, of_images, of_videos = public_inputs(questions, pictures, videos, TOY)
    sample = our_sample(questions, [*videos, *pictures], TOY, folder)
    assert sample.tokens.tolist() == tokens
    found = patch_rows_of(sample, [*videos, *pictures])
    first = 2 * TOY.tokens_per_tile
    assert torch.equal(found, torch.cat([of_videos[:first], of_images, of_videos[first:]]))


def test_targets_stay_with_their_tokens(folder: Path) -> None:
    tokenizer, image = Tokenizer(folder), noise(50, 80)
    sample = our_sample(["<image>\nWhat?"], [image], TOY, folder)
    short = encode_chatml([Turn("user", "<image>\nWhat?"), Turn("assistant", ANSWER)], tokenizer, "released")
    is_text = short.tokens != tokenizer.token_of("<image>")
    assert np.array_equal(sample.targets[~sample.is_image], short.targets[is_text])
    assert (sample.targets[sample.is_image] == IGNORED).all()
