"""Encoded conversations and the sizes of their media to what Aquila-VL reads: rows of tokens, and patch rows.

One token stands for each medium in an encoded conversation. Here it becomes as many as the medium costs
(`megavlm.tiles`), all the same, untrained. This needs the sizes of media alone; their pixels become patch rows by
themselves. As in transformers: an image alone in its sample is cut into a grid, several are padded to squares, and
videos don't count as images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megavlm.batch import IGNORED
from megavlm.data.chat import Encoded
from megavlm.data.sample import IMAGE_TAG, VIDEO_TAG
from megavlm.data.tile_images import Pixels, tile_pixels
from megavlm.errors import DataError, TooLongError
from megavlm.tiles import GridConfig, ImagePlan, Ints, MediaKind, plan_image

MOST_TOKENS = 2**22
"""Of a sample: sizes that say more are refused before rows are made of them."""


@dataclass(frozen=True)
class Medium:
    """The sizes of an image or a video."""

    kind: Literal["image", "video"]
    width: int
    """Pixels."""
    height: int
    frames: int = 1
    """Those of a video that are taken."""


@dataclass(frozen=True)
class SplicedSample:
    """A sample, each of its media at full length."""

    where: str
    """What errors call it."""
    grid: GridConfig
    tokens: Ints
    """[T]"""
    targets: Ints
    """[T]: the token itself where it is trained, else IGNORED."""
    is_image: NDArray[np.bool_]
    """[T]: where the tokens of images and videos are."""
    plans: tuple[ImagePlan, ...]
    """What becomes of the media, in the order of their tags."""
    order: tuple[int, ...]
    """For each plan, which of the given media it is for."""

    @property
    def target_tokens(self) -> int:
        """Tokens that are trained; the first of a sample never is, for want of one before it."""
        return int((self.targets[1:] != IGNORED).sum())


class PackedRow(NamedTuple):
    """Samples one behind another, as `next_token_batch` and `assemble_table` take them."""

    tokens: Tensor
    """[1, length], int64."""
    targets: Tensor
    """[1, length], int64."""
    cu_seqlens: Tensor
    """[documents + 1], int32: where each begins, and the length. Padding is a document of its own."""
    is_image: NDArray[np.bool_]
    """[length]"""
    plans: tuple[ImagePlan, ...]
    """Of all media, in the order of their tags."""


def spliced_sample(
    encoded: Encoded,
    media: Sequence[Medium],
    grid: GridConfig,
    image_token_id: int,
    video_token_id: int | None,
    where: str = "sample",
) -> SplicedSample:
    """A sample with its media at full length: the images for the image tags in order, the videos for the video tags.

    `video_token_id`: None where the tokenizer has none. `where` names the sample in errors.
    """
    tags = {"image": image_token_id, "video": video_token_id}
    assert all(medium.kind in tags for medium in media), media
    is_tag = np.isin(encoded.tokens, [token for token in tags.values() if token is not None])
    places: dict[str, list[int]] = {}
    for kind, token in tags.items():
        places[kind] = [index for index, medium in enumerate(media) if medium.kind == kind]
        _check_tags(kind, 0 if token is None else int((encoded.tokens == token).sum()), len(places[kind]), where)
    rest = {tags[kind]: iter(indices) for kind, indices in places.items()}
    order = tuple(next(rest[token]) for token in encoded.tokens[is_tag].tolist())
    kind_of_image: MediaKind = "image" if len(places["image"]) == 1 else "one_of_several"
    plans = tuple(_plan(media[index], kind_of_image, grid, f"{where}: medium {index}") for index in order)
    counts = np.ones(len(encoded.tokens), np.int64)
    counts[is_tag] = [plan.tokens for plan in plans]
    total = int(counts.sum())
    if total > MOST_TOKENS:
        raise DataError(f"{where}: tokens", total, f"are more than {MOST_TOKENS}", "drop the sample, or cut its media")
    targets = np.where(is_tag, IGNORED, encoded.targets)
    tokens, targets, is_image = (np.repeat(values, counts) for values in (encoded.tokens, targets, is_tag))
    return SplicedSample(where, grid, tokens, targets, is_image, plans, order)


def _check_tags(kind: str, tags: int, media: int, where: str) -> None:
    if tags != media:
        tag = IMAGE_TAG if kind == "image" else VIDEO_TAG
        problem = f"{media} {kind}s come with them"
        raise DataError(f"{where}: {tag} tags", tags, problem, f"write {tag} once for each {kind}, or drop the sample")


def _plan(medium: Medium, kind_of_image: MediaKind, grid: GridConfig, where: str) -> ImagePlan:
    kind = kind_of_image if medium.kind == "image" else "video"
    try:
        return plan_image(medium.width, medium.height, kind, grid, medium.frames)
    except DataError as error:
        raise DataError(f"{where}: {error.where}", error.value, error.problem, error.remedy) from None


def cut_sample(sample: SplicedSample, max_tokens: int) -> SplicedSample:
    """The sample without the text behind so many tokens; refused where that would cut into an image, or one off."""
    if len(sample.tokens) <= max_tokens:
        return sample
    if sample.is_image[max_tokens:].any():
        needed = int(np.flatnonzero(sample.is_image)[-1]) + 1
        problem = f"its images and videos need {needed}"
        raise TooLongError(f"{sample.where}: max_tokens", max_tokens, problem, "allow more, cap its tiles, or drop it")
    cut = {name: getattr(sample, name)[:max_tokens] for name in ("tokens", "targets", "is_image")}
    return dataclasses.replace(sample, **cut)


def patch_rows_of(sample: SplicedSample, pixels: Sequence[Pixels]) -> Tensor:
    """Patch rows float32 [tiles * tokens_per_tile, 3 * patch_size**2] of a sample's media, in the order of their tags.

    `pixels` come as the media did: [height, width, 3] of an image, [frames, height, width, 3] of a video.
    """
    rows = []
    for plan, index in zip(sample.plans, sample.order, strict=True):
        frames = (plan.tiles,) if plan.kind == "video" else ()
        expected = (*frames, plan.height, plan.width, 3)
        if pixels[index].shape != expected:
            problem = f"the sample was made for {expected}"
            where = f"{sample.where}: shape of medium {index}"
            raise DataError(where, pixels[index].shape, problem, "index the data again: a file has changed")
        rows.append(tile_pixels(plan, pixels[index]))
    return torch.cat([torch.empty(0, 3 * sample.grid.patch_size**2), *rows])


def pack_samples(samples: Sequence[SplicedSample], length: int | None = None, padding_id: int = 0) -> PackedRow:
    """One row of whole samples, padded to `length` (None: not at all) by a document in which nothing is trained."""
    lengths = [len(sample.tokens) for sample in samples]
    missing = 0 if length is None else length - sum(lengths)
    assert missing >= 0, f"{sum(lengths)} tokens in a row of {length}"
    assert all(lengths) and sum(lengths) + missing > 0, "a document has at least one token"
    padding = np.full(missing, padding_id, np.int64)
    tokens = np.concatenate([*(sample.tokens for sample in samples), padding])
    targets = np.concatenate([*(sample.targets for sample in samples), np.full(missing, IGNORED, np.int64)])
    is_image = np.concatenate([*(sample.is_image for sample in samples), np.zeros(missing, np.bool_)])
    bounds = np.cumsum([0, *lengths, *([missing] if missing else [])])
    return PackedRow(
        torch.from_numpy(tokens)[None],
        torch.from_numpy(targets)[None],
        torch.from_numpy(bounds.astype(np.int32)),
        is_image,
        tuple(plan for sample in samples for plan in sample.plans),
    )
