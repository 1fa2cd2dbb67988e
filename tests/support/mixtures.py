"""Batches whose lengths are spread like Infinity-MM's: what packing and balancing are tried on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megavlm.tiles import GridConfig, Ints, MediaKind, tile_counts, token_counts


class Batch(NamedTuple):
    """The samples of a step, as an index knows them."""

    tokens: Ints
    text_tokens: Ints
    """Those of the tokens that are text, which stands behind the images."""
    tiles: Ints

    def flops(self, hidden: int = 1536, layers: int = 28) -> NDArray[np.float64]:
        """[2, samples]: a forward pass in a decoder like Qwen2.5-1.5B, and in a tower like SigLIP-so400m."""
        weights, tower_weights, tokens_per_tile = 1.54e9, 0.43e9, 729
        decoder = 2 * weights * self.tokens + 2 * layers * hidden * self.tokens.astype(np.float64) ** 2
        return np.stack([decoder, 2 * tower_weights * tokens_per_tile * self.tiles])


class Group(NamedTuple):
    """A kind of sample: its part of the mixture and what it is made of."""

    share: float
    sizes: tuple[tuple[int, int], ...]
    """(width, height) of its pictures before they are varied; none: text alone."""
    median_text: int
    spread: float
    """Standard deviation of the logarithm of its text tokens."""
    pictures: int = 1


PHOTOS = ((640, 480), (640, 480), (480, 640), (640, 427), (500, 375), (1024, 768), (800, 600), (336, 336), (1024, 1024))
PAGES = ((1240, 1754), (1654, 2339), (1700, 2200), (850, 1100))
CHARTS = ((640, 480), (850, 600), (1200, 800), (1000, 400), (2400, 240))
SCREENS = ((1920, 1080), (1280, 720), (1080, 1920))
FIGURES = ((240, 200), (400, 300), (384, 384), (600, 200))

MIXTURE = (
    Group(0.31, (), 350, 1.0),
    Group(0.27, PHOTOS, 200, 0.8),
    Group(0.02, PHOTOS, 250, 0.8, pictures=3),
    Group(0.11, (*PHOTOS, *SCREENS), 90, 0.7),
    Group(0.24, (*PAGES, *CHARTS, *SCREENS), 150, 0.8),
    Group(0.05, FIGURES, 250, 0.7),
)
"""Shares: the categories of Infinity-MM's second stage (text, general, OCR, documents with charts and screens, maths),
arXiv 2410.18558, table 1. Sizes and lengths: ours, from data sets of these kinds."""
LONGEST_TEXT = 3_000


def draw_batch(grid: GridConfig, samples: int, seed: int, mixture: tuple[Group, ...] = MIXTURE) -> Batch:
    """The samples of a step, drawn independently."""
    draw = np.random.default_rng(seed)
    shares = np.array([group.share for group in mixture])
    group_of = draw.choice(len(mixture), samples, p=shares / shares.sum())
    text, images, tiles = (np.zeros(samples, np.int64) for _ in range(3))
    for number, group in enumerate(mixture):
        members = np.flatnonzero(group_of == number)
        lengths = group.median_text * np.exp(group.spread * draw.standard_normal(len(members)))
        text[members] = lengths.clip(16, LONGEST_TEXT).astype(np.int64)
        if group.sizes and len(members):
            kind: MediaKind = "image" if group.pictures == 1 else "one_of_several"
            sizes = np.array(group.sizes)[draw.integers(len(group.sizes), size=len(members))]
            # Half of a data set's pictures have its usual sizes, the others are crops and scans of any size.
            varied = sizes * draw.uniform(0.5, 1.5, sizes.shape)
            widths, heights = np.where(draw.random((len(members), 1)) < 0.5, sizes, varied).astype(np.int64).T
            images[members] = group.pictures * token_counts(widths, heights, kind, grid)
            tiles[members] = group.pictures * tile_counts(widths, heights, kind, grid)
    return Batch(images + text, text, tiles)
