"""Where a toy resampler starts: each of its 64 latents looks at one patch of the 8 x 8 and hands it on.

From random weights a resampler needs many thousand pictures before its latents look at different places; a toy run has
no time for that. The first layer gets an attention that is read off the tower's own code of places, all else is fresh.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megavlm.model.resampler import ResamplerConfig
from megavlm.toy.seen import GRID

FIRST_ATTENTION = ("layers.0.0.to_q.weight", "layers.0.0.to_kv.weight", "layers.0.0.to_out.weight")
SHARPNESS = 30.0
"""Of the first layer's attention: how far the logits of a place's own row and column stand out."""


def place_readings(heads_weight: Tensor) -> Tensor:
    """[2 * GRID, D]: of the tower's linear readings, those of a patch's row and column, without what all share."""
    rows, columns = heads_weight[-2 * GRID : -GRID], heads_weight[-GRID:]
    return torch.cat([rows - rows.mean(0), columns - columns.mean(0)])


def looking_latents(fresh: dict[str, Tensor], places: Tensor, config: ResamplerConfig, seed: int) -> dict[str, Tensor]:
    """The fresh tensors (by their names behind `model.perceiver.`) with latents and first attention set."""
    width, head = config.width, config.head_width
    assert config.num_latents == GRID * GRID and config.heads * head >= 2 * width
    codes = _codes(places, seed)
    latents = (codes[:GRID, None] + codes[None, GRID:]).reshape(-1, width) * (width / 2) ** 0.5
    readings = places / places.norm(dim=1).mean()
    to_q, to_k = torch.zeros(config.inner_width, width), torch.zeros(config.inner_width, width)
    to_v, to_out = torch.zeros(config.inner_width, width), torch.zeros(width, config.inner_width)
    for number in range(-(-width // head)):  # each of these heads hands on as many channels as it has
        first, channels = number * head, range(number * head, min((number + 1) * head, width))
        to_q[first : first + 2 * GRID] = codes * SHARPNESS / width**0.5
        to_k[first : first + 2 * GRID] = readings
        for place, channel in enumerate(channels):
            to_v[first + place, channel] = 1.0
            to_out[channel, first + place] = 1.0
    free = slice(-(-width // head) * head, None)
    old_k, old_v = fresh["layers.0.0.to_kv.weight"].chunk(2)
    to_q[free], to_k[free], to_v[free] = fresh["layers.0.0.to_q.weight"][free], old_k[free], old_v[free]
    return {
        "latents": latents,
        "layers.0.0.to_q.weight": to_q,
        "layers.0.0.to_kv.weight": torch.cat([to_k, to_v]),
        "layers.0.0.to_out.weight": to_out,
    }


def _codes(places: Tensor, seed: int) -> Tensor:
    """[2 * GRID, D] orthonormal, and orthogonal to the readings of places and to a constant: no latent is a patch."""
    width = places.size(1)
    generator = torch.Generator().manual_seed(seed)
    taken = torch.cat([torch.ones(1, width), places, torch.randn(2 * GRID, width, generator=generator)])
    # Rows of places are dependent (each kind sums to zero), so a basis comes from the singular vectors of the rest.
    basis = torch.linalg.svd(taken[: 1 + len(places)], full_matrices=True).Vh[1 + len(places) :]
    mixed = torch.linalg.qr((taken[1 + len(places) :] @ basis.T).T).Q.T
    return mixed @ basis
