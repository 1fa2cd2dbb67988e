"""Picture files to patch rows by PIL: the reference, and what decodes where DALI is not installed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megavlm.data.formats import PlannedPicture
from megavlm.data.images import DEFAULT_LIMITS, clip_pixels, decode_image, opened, upright
from megavlm.data.tile_images import tile_pixels
from megavlm.errors import DataError
from megavlm.tiles import patch_rows


@dataclass(frozen=True)
class ClipSquare:
    """What InfiMM's towers take of a picture: its middle square."""

    size: int
    patch_size: int

    @property
    def rows(self) -> int:
        """Patch rows of a picture."""
        return (self.size // self.patch_size) ** 2

    @property
    def values(self) -> int:
        """Numbers in a patch row."""
        return 3 * self.patch_size**2


class PilDecoder:
    """Decodes with threads: PIL lets go of the interpreter while it works."""

    def __init__(self, threads: int, square: ClipSquare | None = None) -> None:
        """`square`: for pictures without a plan."""
        self.square = square
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode(self, pictures: Sequence[tuple[Sequence[bytes], PlannedPicture]]) -> tuple[list[Tensor], list[str]]:
        """The patch rows of each picture, and what is wrong with it ("" for nothing; its rows are then blank)."""
        found = list(self._threads.map(self._one, pictures))
        return [rows for rows, _ in found], [problem for _, problem in found]

    def _one(self, picture: tuple[Sequence[bytes], PlannedPicture]) -> tuple[Tensor, str]:
        files, planned = picture
        try:
            return self._rows(files, planned), ""
        except DataError as error:
            return self._blank(planned), str(error)

    def _rows(self, files: Sequence[bytes], planned: PlannedPicture) -> Tensor:
        plan = planned.plan
        if plan is None:
            assert self.square is not None, "pictures without a plan need a square"
            with opened(files[0], "picture", DEFAULT_LIMITS) as image:
                return patch_rows(clip_pixels(upright(image), self.square.size)[None], self.square.patch_size)
        frames = [decode_image(file, "picture") for file in files]
        expected = (plan.height, plan.width, 3)
        for frame in frames:
            if frame.shape != expected:
                problem = f"the index says {expected}"
                raise DataError("picture: shape", frame.shape, problem, "index the data again: a file has changed")
        return tile_pixels(plan, np.stack(frames) if plan.kind == "video" else frames[0])

    def _blank(self, planned: PlannedPicture) -> Tensor:
        if planned.plan is not None:
            return torch.zeros(planned.plan.patch_rows, 3 * planned.plan.grid.patch_size**2)
        assert self.square is not None
        return torch.zeros(self.square.rows, self.square.values)
