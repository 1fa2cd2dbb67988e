"""From a text with `<image>` tags and picture files to what the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megavlm.batch import IGNORED
from megavlm.build.run_config import RunConfig
from megavlm.data.chat import ChatConfig, Encoded, encode_chat, tag_first
from megavlm.data.images import clip_pixels, decode_image, open_image
from megavlm.data.sample import IMAGE_TAG, VIDEO_TAG, Turn
from megavlm.data.splice import Medium, patch_rows_of, spliced_sample
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.video import decode_video
from megavlm.errors import ConfigError, DataError, WeightsError
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


def read_prompt(
    text: str, image_files: Sequence[str], video_files: Sequence[str], run: RunConfig, tokenizer: Tokenizer, chat: bool
) -> Prompt:
    """The prompt of a text and what belongs at its tags; with `chat` as a question in the chat format."""
    if run.aquila_vl is not None:
        return _spliced_prompt(text, image_files, video_files, run, tokenizer, chat)
    if video_files:
        raise DataError("--video", list(video_files), f"{run.name} reads no videos", "leave them out")
    if run.infimm is None:
        if image_files:
            raise DataError("--image", list(image_files), f"{run.name} is a decoder alone", "leave the images out")
        return Prompt(_as_tensor(_tokens(text, run, tokenizer, chat)))
    _check_tag(tokenizer, IMAGE_TAG, run.infimm.image_token_id)
    tags = text.count(IMAGE_TAG)
    _check_tags(tags, IMAGE_TAG, len(image_files))
    tower = run.infimm.tower
    pixels = [clip_pixels(open_image(file), tower.image_size) for file in image_files]
    patches = patch_rows(torch.stack(pixels), tower.patch_size) if pixels else None
    return Prompt(_as_tensor(_tokens(text, run, tokenizer, chat)), tags, patches)


def _spliced_prompt(
    text: str,
    image_files: Sequence[str],
    video_files: Sequence[str],
    run: RunConfig,
    tokenizer: Tokenizer,
    chat: bool,
) -> Prompt:
    """As training reads it: the tokens of each image and video in the place of its tag."""
    parts = run.aquila_vl
    assert parts is not None
    for tag, token, files in (
        (IMAGE_TAG, parts.image_token_id, image_files),
        (VIDEO_TAG, parts.video_token_id, video_files),
    ):
        _check_tags(text.count(tag), tag, len(files))
        if files:
            _check_tag(tokenizer, tag, token)
    pixels = [decode_image(Path(file), "image") for file in image_files]
    pixels += [decode_video(Path(file), "video") for file in video_files]
    media = [
        Medium("video" if one.ndim == 4 else "image", one.shape[-2], one.shape[-3], len(one) if one.ndim == 4 else 1)
        for one in pixels
    ]
    tokens = _tokens(text, run, tokenizer, chat)
    encoded = Encoded(np.array(tokens, np.int64), np.full(len(tokens), IGNORED))
    sample = spliced_sample(encoded, media, parts.grid, *parts.placeholders, where="--prompt")
    tiles = sum(plan.tiles for plan in sample.plans)
    return Prompt(torch.from_numpy(sample.tokens), tiles, patch_rows_of(sample, pixels), sample.plans)


def _check_tag(tokenizer: Tokenizer, tag: str, token: int) -> None:
    if tokenizer.token_of(tag) != token:
        raise WeightsError(
            f"token of {tag} in {tokenizer.folder}",
            tokenizer.token_of(tag),
            f"config.json says {token}",
            "take tokenizer and config.json from one folder",
        )


def _check_tags(tags: int, tag: str, files: int) -> None:
    if tags != files:
        kind = "images" if tag == IMAGE_TAG else "videos"
        raise DataError(
            f"{tag} tags in the prompt",
            tags,
            f"{files} {kind} come with it",
            f"write {tag} once for each of the {kind}, where it belongs",
        )


def _as_tensor(tokens: list[int]) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64)


def _tokens(text: str, run: RunConfig, tokenizer: Tokenizer, chat: bool) -> list[int]:
    if not chat:
        return tokenizer.encode(text)
    if run.data is not None:  # a checkpoint: as it was trained
        return _question(text, run.data.chat, tokenizer)
    if run.aquila_vl is not None:
        return tokenizer.encode_question(tag_first(text), in_parts=False)
    return tokenizer.encode_question(text)


def _question(text: str, chat: ChatConfig, tokenizer: Tokenizer) -> list[int]:
    if chat.template == "plain":
        problem = "asks a checkpoint that was trained on captions alone, without a chat format"
        raise ConfigError("--chat", True, problem, "leave out --chat")
    tokens: list[int] = encode_chat([Turn("user", text)], tokenizer, chat, "--prompt", open_answer=True).tokens.tolist()
    return tokens
