"""Images of cases for Aquila-VL: the tensors that transformers' processor makes, as our batches take them.

`pixel_values` [images, most tiles, 3, H, W] and `image_sizes` [images, 2] (height, width) of all rows' images in order,
`batch_num_images` [B] (how many each row has; left out: one), and `pixel_values_videos` [videos, frames, 3, H, W]. As
many as a row's placeholders ask for are taken in order; the rows are read from the first to the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megavlm.build.run_config import AquilaVLConfig
from megavlm.errors import DataError
from megavlm.tiles import ImagePlan, MediaKind, patch_rows, plan_image

MEDIA_TENSORS = ("pixel_values", "image_sizes", "batch_num_images", "pixel_values_videos", "batch_num_videos")


@dataclass(frozen=True)
class RowMedia:
    """The images and videos of one row."""

    is_image: NDArray[np.bool_]
    """[1, length]"""
    plans: Sequence[ImagePlan]
    patches: Tensor


def read_media(tensors: Mapping[str, Tensor], row: int, tokens: Tensor, parts: AquilaVLConfig) -> RowMedia:
    """What the row `tokens` [1, length] has of the case's images and videos."""
    images = iter(_images_of_row(tensors, row, parts))
    videos = iter(_videos_of_row(tensors, row, parts))
    kinds = {parts.image_token_id: images, parts.video_token_id: videos}
    plans, patches, place = [], [torch.empty(0, parts.tower.patch_values)], 0
    flat = tokens.flatten().tolist()
    while place < len(flat):
        found = next(islice(kinds[flat[place]], 1), None) if flat[place] in kinds else None
        if flat[place] in kinds and found is None:
            raise DataError(f"row {row}: token {place}", flat[place], "no image is left for it", "record the case anew")
        if found is not None:
            plan, pixels = found
            plans.append(plan)
            patches.append(_patches(pixels, parts))
            place += plan.tokens
        else:
            place += 1
    is_image = torch.isin(tokens, torch.tensor(list(kinds))).numpy()
    expected = sum(plan.tokens for plan in plans)
    if int(is_image.sum()) != expected:
        problem = f"its images have {expected} tokens"
        raise DataError(f"row {row}: placeholders", int(is_image.sum()), problem, "record the case anew")
    return RowMedia(is_image, plans, torch.cat(patches))


def _patches(pixels: Tensor, parts: AquilaVLConfig) -> Tensor:
    used = parts.tower.grid * parts.tower.patch_size
    return patch_rows(pixels[..., :used, :used], parts.tower.patch_size)


def _images_of_row(tensors: Mapping[str, Tensor], row: int, parts: AquilaVLConfig) -> list[tuple[ImagePlan, Tensor]]:
    if "pixel_values" not in tensors:
        return []
    counts = tensors.get("batch_num_images", torch.ones(len(tensors["pixel_values"]))).long().tolist()
    first, count = sum(counts[:row]), counts[row]
    kind: MediaKind = "image" if count == 1 else "one_of_several"
    found = []
    for number in range(first, first + count):
        height, width = tensors["image_sizes"][number].tolist()
        plan = plan_image(width, height, kind, parts.grid)
        found.append((plan, tensors["pixel_values"][number, : plan.tiles]))
    return found


def _videos_of_row(tensors: Mapping[str, Tensor], row: int, parts: AquilaVLConfig) -> list[tuple[ImagePlan, Tensor]]:
    if "pixel_values_videos" not in tensors:
        return []
    videos = tensors["pixel_values_videos"]
    counts = tensors.get("batch_num_videos", torch.ones(len(videos))).long().tolist()
    size = parts.tower.image_size
    chosen = videos[sum(counts[:row]) :][: counts[row]]
    return [(plan_image(size, size, "video", parts.grid, frames=len(frames)), frames) for frames in chosen]
