"""What a decoder has to do for a batch of encoded pictures: files to be resized, and where their pixels go.

All pictures of a batch share one buffer of uint8 pixels, which `tile_pack` cuts into patch rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megavlm.data.images import CLIP_MEAN, CLIP_STD, center_size
from megavlm.data.tile_images import MEAN, STD, Pixels
from megavlm.data.tile_tables import CHANNELS, centre_tile, resized_sizes, tile_table
from megavlm.errors import DataError
from megavlm.tiles import ImagePlan, Ints

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class PixelRule:
    """A family's way from a decoded picture to the values of its tiles."""

    crops: bool
    """The shortest side is scaled to a tile and the middle is kept; or the tiles are those of `tile_images`."""
    mean: Triple
    std: Triple
    """Of values from 0 to 1."""


TILED = PixelRule(False, (MEAN,) * 3, (STD,) * 3)
"""Aquila-VL's."""
CLIP = PixelRule(True, CLIP_MEAN, CLIP_STD)
"""InfiMM's; its plans have one tile, the tower's image."""


class EncodedPicture(NamedTuple):
    """A picture or video as it is stored, and what becomes of it."""

    files: tuple[bytes, ...]
    """One; of a video one for each frame of the plan."""
    plan: ImagePlan
    where: str = "image"
    """What errors call it."""


class Place(NamedTuple):
    """A picture once resized, what is kept of that, and where it lies in the buffer."""

    width: int
    height: int
    box: tuple[int, int, int, int]
    """(left, top, right, bottom) of what is kept."""
    first_byte: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the pixels that are kept."""
        left, top, right, bottom = self.box
        return bottom - top, right - left, CHANNELS

    @property
    def end(self) -> int:
        """The byte behind the last."""
        height, width, channels = self.shape
        return self.first_byte + height * width * channels

    def kept(self, resized: Pixels) -> Pixels:
        """The part of the resized picture that is kept."""
        left, top, right, bottom = self.box
        return resized[top:bottom, left:right]

    def store(self, pixels: Pixels, buffer: Tensor) -> None:
        """Put the part that is kept into the buffer."""
        target = self.view(buffer)
        if target.is_cpu:
            # torch would start threads of its own for this, in each of ours.
            np.copyto(target.numpy(), pixels)
        else:
            target.copy_(torch.from_numpy(np.ascontiguousarray(pixels)))

    def view(self, buffer: Tensor) -> Tensor:
        """[height, width, 3]: the buffer's part for it."""
        return buffer[self.first_byte : self.end].view(self.shape)


class Job(NamedTuple):
    """A file to be decoded, and what its picture is resized to."""

    picture: int
    """Which of the batch's it is, or belongs to."""
    file: bytes
    where: str
    plan: ImagePlan
    places: tuple[Place, ...]
    is_squared: bool
    """Whether it is put in the middle of a grey square."""

    @property
    def pixels(self) -> int:
        """Pixels in memory before it is resized."""
        side = max(self.plan.width, self.plan.height)
        return side * side if self.is_squared else self.plan.width * self.plan.height


@dataclass(frozen=True)
class Batch:
    """The work for a batch."""

    jobs: list[Job]
    tables: list[Ints]
    """Of each picture, `tile_pack`'s rows."""
    problems: list[DataError | None]
    """Of each picture, what is wrong with it before it is looked into."""
    bytes: int
    """Of the buffer."""


def batch_of(pictures: Sequence[EncodedPicture], rule: PixelRule) -> Batch:
    """What has to be done for these pictures."""
    jobs: list[Job] = []
    tables: list[Ints] = []
    problems: list[DataError | None] = []
    first_byte = 0
    for number, (files, plan, where) in enumerate(pictures):
        expected = plan.tiles if plan.kind == "video" else 1
        problems.append(None if len(files) == expected else _wrong_number(where, len(files), expected))
        if problems[-1] is not None:
            tables.append(blank_table(plan))
            continue
        places = _places(plan, rule, first_byte)
        tables.append(_table(plan, rule, places))
        first_byte = places[-1].end
        per_file = [(place,) for place in places] if plan.kind == "video" else [tuple(places)]
        is_squared = plan.kind == "one_of_several" and not rule.crops
        for frame, (file, own) in enumerate(zip(files, per_file, strict=True)):
            name = f"{where}: frame {frame}" if plan.kind == "video" else where
            jobs.append(Job(number, file, name, plan, own, is_squared))
    # Blank tiles lie beside a picture of one pixel at its beginning, whatever else it holds.
    return Batch(jobs, tables, problems, max(first_byte, CHANNELS))


def blank_table(plan: ImagePlan) -> Ints:
    """`tile_pack`'s rows for a picture that could not be decoded: black tiles, without a byte of their own."""
    return np.tile(np.array([[0, 1, 1, 1, 0]], np.int64), (plan.tiles, 1))


def _places(plan: ImagePlan, rule: PixelRule, first_byte: int) -> list[Place]:
    places: list[Place] = []
    if rule.crops:
        assert plan.split is None, "what is cropped has no grid"
        side = plan.grid.tile_size
        width, height = center_size(plan.width, plan.height, side)
        (_, _, _, top, left) = centre_tile(height, width, side)[0].tolist()
        for _ in range(plan.tiles):
            places.append(Place(width, height, (left, top, left + side, top + side), first_byte))
            first_byte = places[-1].end
        return places
    for height, width in resized_sizes(plan):
        places.append(Place(width, height, (0, 0, width, height), first_byte))
        first_byte = places[-1].end
    return places


def _table(plan: ImagePlan, rule: PixelRule, places: Sequence[Place]) -> Ints:
    if not rule.crops:
        return tile_table(plan, places[0].first_byte)
    side = plan.grid.tile_size
    return np.array([(place.first_byte, side, side, 0, 0) for place in places], np.int64)


def _wrong_number(where: str, files: int, expected: int) -> DataError:
    return DataError(where, f"{files} files", f"its index says {expected}", "index the data set again")
