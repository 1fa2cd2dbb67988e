"""Which image each tile of text tokens visits: tokens sorted by image, cut into tiles that hold one image each.

Only shapes decide how much is allocated, so building it on a GPU never makes the host wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megavlm_kernels.launch import ceil_div


@dataclass(frozen=True)
class MediaSchedule:
    """All int64 on the device of image_index. Tokens without an image form tiles of their own, at the front."""

    order: torch.Tensor
    """[tokens]: token numbers, those without an image first, then image by image, in the order given."""
    starts: torch.Tensor
    """[images + 1]: image i owns order[starts[i] : starts[i + 1]]."""
    tile_image: torch.Tensor
    """[tiles]: the image of each tile; -1 for tokens without one, and for the empty tiles at the end."""
    tile_begin: torch.Tensor
    tile_end: torch.Tensor
    """[tiles] each: the tile holds order[tile_begin : tile_end]."""
    block: int
    """Most tokens a tile holds."""

    def visits(self) -> int:
        """How many (tile, image) pairs are computed: at most ceil(tokens / block) + number of image boundaries."""
        return int(((self.tile_image >= 0) & (self.tile_end > self.tile_begin)).sum())


def media_schedule(image_index: torch.Tensor, images: int, block: int = 64) -> MediaSchedule:
    """For image_index [tokens]: the image of each token, -1 where it has none. Build it once for all layers."""
    tokens = image_index.shape[0]
    index = image_index.long()
    index = torch.where(index < images, index, -1).clamp(min=-1)
    ordered, order = torch.sort(index, stable=True)
    groups = torch.arange(-1, images + 1, device=index.device)
    starts = torch.searchsorted(ordered, groups)
    tiles_of_group = (starts.diff() + block - 1) // block
    tiles_until = tiles_of_group.cumsum(0)
    tile = torch.arange(ceil_div(tokens, block) + images, device=index.device)
    group = torch.searchsorted(tiles_until, tile, right=True)
    is_empty = group > images
    group = group.clamp(max=images)
    within = tile - (tiles_until - tiles_of_group)[group]
    begin = (starts[group] + within * block).clamp(max=tokens)
    end = torch.minimum(begin + block, starts[group + 1])
    return MediaSchedule(
        order=order,
        starts=starts[1:],
        tile_image=torch.where(is_empty, -1, group - 1),
        tile_begin=begin,
        tile_end=torch.where(is_empty, begin, end),
        block=block,
    )
