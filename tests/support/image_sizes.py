"""Sizes of images that try the image-token contract: likely ones, and those where rounding could go wrong."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Sizes = tuple[NDArray[np.int64], NDArray[np.int64]]


def random_sizes(count: int, seed: int) -> Sizes:
    """(widths, heights): photographs, thumbnails, strips up to aspect 200, whole multiples of a tile and their
    neighbours, sides of one pixel, sides whose ratio is a short fraction, and sides far beyond any camera's."""
    draw = np.random.default_rng(seed)
    part = count // 8
    base = draw.integers(1, 60, part)
    near_tiles = 384 * draw.integers(1, 9, (2, part)) + draw.integers(-1, 2, (2, part))
    groups = [
        draw.integers(64, 4097, (2, part)),
        draw.integers(1, 400, (2, part)),
        np.stack([base * draw.integers(1, 201, part), base]),
        near_tiles,
        np.stack([np.ones(part, np.int64), draw.integers(1, 10_000, part)]),
        np.stack([base * draw.integers(1, 28, part), base * draw.integers(1, 28, part)]),
        draw.integers(1, 10_000_001, (2, part)),
    ]
    rest = count - sum(group.shape[1] for group in groups)
    widths, heights = np.concatenate([*groups, draw.integers(200, 2001, (2, rest))], axis=1)
    turned = draw.random(count) < 0.5
    return np.where(turned, heights, widths), np.where(turned, widths, heights)
