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


def is_whole(tensor: Tensor) -> bool:
    """Whether it holds whole numbers."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_media(tensors: Mapping[str, Tensor], rows: int, parts: AquilaVLConfig, where: str) -> None:
    """Refuse tensors that are not of the shapes above, or that do not belong to so many rows."""
    size = parts.tower.image_size
    for pixels, counts in (("pixel_values", "batch_num_images"), ("pixel_values_videos", "batch_num_videos")):
        if pixels not in tensors:
            continue
        shape = tuple(tensors[pixels].shape)
        if len(shape) != 5 or shape[2:] != (3, size, size) or not tensors[pixels].is_floating_point():
            remedy = f"give them as [number, tiles or frames, 3, {size}, {size}]"
            raise DataError(f"{where}.{pixels}", shape, "are no normalised pictures of the tower's size", remedy)
        count = _counts(tensors, pixels, counts)
        if tuple(count.shape) != (rows,) or not is_whole(count) or int(count.min()) < 0 or int(count.sum()) != shape[0]:
            problem = f"does not deal {shape[0]} of them to {rows} rows"
            raise DataError(f"{where}.{counts}", count.tolist(), problem, "say for each row how many it has")
    if "pixel_values" in tensors:
        sizes, expected = tensors.get("image_sizes"), (len(tensors["pixel_values"]), 2)
        if sizes is None or tuple(sizes.shape) != expected or not is_whole(sizes):
            found = None if sizes is None else tuple(sizes.shape)
            raise DataError(f"{where}.image_sizes", found, f"should be {expected}", "give height and width of each")


def _counts(tensors: Mapping[str, Tensor], pixels: str, counts: str) -> Tensor:
    """How many each row has: one, where it is not said."""
    return tensors.get(counts, torch.ones(len(tensors[pixels]), dtype=torch.int64))


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
    counts = _counts(tensors, "pixel_values", "batch_num_images").tolist()
    first, count = sum(counts[:row]), counts[row]
    kind: MediaKind = "image" if count == 1 else "one_of_several"
    found = []
    for number in range(first, first + count):
        height, width = tensors["image_sizes"][number].tolist()
        plan, tiles = plan_image(width, height, kind, parts.grid), tensors["pixel_values"][number]
        if plan.tiles > len(tiles):
            problem = f"an image of {width}x{height} has {plan.tiles}"
            raise DataError(f"row {row}: tiles in pixel_values", len(tiles), problem, "record the case anew")
        found.append((plan, tiles[: plan.tiles]))
    return found


def _videos_of_row(tensors: Mapping[str, Tensor], row: int, parts: AquilaVLConfig) -> list[tuple[ImagePlan, Tensor]]:
    if "pixel_values_videos" not in tensors:
        return []
    videos = tensors["pixel_values_videos"]
    counts = _counts(tensors, "pixel_values_videos", "batch_num_videos").tolist()
    size = parts.tower.image_size
    chosen = videos[sum(counts[:row]) :][: counts[row]]
    return [(plan_image(size, size, "video", parts.grid, frames=len(frames)), frames) for frames in chosen]
