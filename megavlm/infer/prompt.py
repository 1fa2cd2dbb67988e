"""From a text with `<image>` tags and picture files to what the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megavlm.build.run_config import RunConfig
from megavlm.data.images import clip_pixels, open_image
from megavlm.data.tokenizer import IMAGE_TAG, Tokenizer
from megavlm.errors import DataError, WeightsError
from megavlm.tiles import ImagePlan, patch_rows


@dataclass(frozen=True)
class Prompt:
    """One text to go on with, and its images in the order of their tags."""

    tokens: Tensor
    """[length], int64; of Aquila-VL as many placeholders for each image as it has tokens."""
    images: int = 0
    """How many images there are."""
    patches: Tensor | None = None
    """[images * patches of one, values of a patch], as `tiles` lays them; none where there are no images."""
    plans: tuple[ImagePlan, ...] = ()
    """Of Aquila-VL: how each image is cut into tiles."""


def read_prompt(text: str, image_files: Sequence[str], run: RunConfig, tokenizer: Tokenizer, chat: bool) -> Prompt:
    """The prompt of a text and its images, one for each tag in it; with `chat` as a question in the chat format."""
    if run.infimm is None:
        if image_files:
            raise DataError("--image", list(image_files), f"{run.name} is a decoder alone", "leave the images out")
        return Prompt(_tokens(text, tokenizer, chat))
    if tokenizer.token_of(IMAGE_TAG) != run.infimm.image_token_id:
        raise WeightsError(
            f"token of {IMAGE_TAG} in {tokenizer.folder}",
            tokenizer.token_of(IMAGE_TAG),
            f"config.json says {run.infimm.image_token_id}",
            "take tokenizer and config.json from one folder",
        )
    tags = text.count(IMAGE_TAG)
    if tags != len(image_files):
        raise DataError(
            f"{IMAGE_TAG} tags in the prompt",
            tags,
            f"{len(image_files)} images come with it",
            f"write {IMAGE_TAG} once for each image, where it belongs",
        )
    tower = run.infimm.tower
    pixels = [clip_pixels(open_image(file), tower.image_size) for file in image_files]
    patches = patch_rows(torch.stack(pixels), tower.patch_size) if pixels else None
    return Prompt(_tokens(text, tokenizer, chat), tags, patches)


def _tokens(text: str, tokenizer: Tokenizer, chat: bool) -> torch.Tensor:
    tokens = tokenizer.encode_question(text) if chat else tokenizer.encode(text)
    return torch.tensor(tokens, dtype=torch.int64)
