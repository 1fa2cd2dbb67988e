"""media_attention in plain PyTorch: the truth that the kernel is held against, and what the CPU runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megavlm_kernels.dispatch import is_without_data
from megavlm_kernels.launch import ceil_div
from megavlm_kernels.media.schedule import media_schedule

MOST_TOKENS = 64
"""In a tile; a tile is padded to full length, so short runs of tokens get shorter tiles."""


def media_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, image_index: torch.Tensor, scale: float
) -> torch.Tensor:
    """Shapes as in `op.media_attention`; autograd gives the backward. Tiles of one image each, as one batch."""
    tokens, images = q.shape[0], k.shape[0]
    if tokens == 0 or images == 0:
        # The sums keep k and v part of the graph, as they are in every other batch.
        return q.masked_fill((image_index < 0)[:, None, None], 0.0) + 0 * (k.sum() + v.sum())
    block = min(MOST_TOKENS, ceil_div(tokens, 2 * images))
    token, image, target = _tiles(image_index, images, block)
    q_tiles = q.index_select(0, token.flatten()).unflatten(0, token.shape)
    out = F.scaled_dot_product_attention(
        q_tiles.transpose(1, 2),
        k.index_select(0, image).transpose(1, 2),
        v.index_select(0, image).transpose(1, 2),
        scale=scale,
    )
    zeros = q.new_zeros(tokens + 1, *q.shape[1:])
    return zeros.index_copy(0, target.flatten(), out.transpose(1, 2).flatten(0, 1))[:tokens]


def _tiles(image_index: torch.Tensor, images: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token [tiles, block], image [tiles], target [tiles, block]): what each slot reads, and the row that it writes.

    Slots without a token read any token and write row `tokens`, which is thrown away.
    """
    tokens = image_index.shape[0]
    schedule = media_schedule(image_index, images, block)
    is_visited = (schedule.tile_image >= 0) & (schedule.tile_end > schedule.tile_begin)
    position = schedule.tile_begin[:, None] + torch.arange(block, device=image_index.device)
    has_token = is_visited[:, None] & (position < schedule.tile_end[:, None])
    token = schedule.order[position.clamp(max=tokens - 1)]
    image, target = schedule.tile_image.clamp(min=0), torch.where(has_token, token, tokens)
    if is_without_data(image_index):
        return token, image, target
    return token[is_visited], image[is_visited], target[is_visited]
