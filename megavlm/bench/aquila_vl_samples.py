"""Random samples of an Aquila-VL, and the two ways in which a step gets them: packed in a row, or padded in a batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megavlm.batch import IGNORED, TextBatch
from megavlm.data.assemble_tables import spliced_batch
from megavlm.tiles import GridConfig, ImagePlan, patch_rows, plan_image


@dataclass(frozen=True)
class Shapes:
    """What the samples of a step look like: one for each picture, and one of text alone."""

    grid: GridConfig
    sizes: Sequence[tuple[int, int]]
    """(width, height) of each picture."""
    text: int
    """Tokens of text in a sample with a picture."""
    text_alone: int
    """The same in the one without."""
    image_token: int
    words: range
    """The tokens that text is drawn from."""
    multiple: int = 1
    """Each text is made longer until the sample's tokens are a multiple of this."""


@dataclass(frozen=True)
class DrawnSample:
    """Text tokens before and behind an image, if there is one, and its tiles [tiles, 3, H, W]."""

    before: list[int]
    behind: list[int]
    plan: ImagePlan | None
    tiles: Tensor
    image_token: int

    @property
    def tokens(self) -> list[int]:
        return [*self.before, *([self.image_token] * self.plan.tokens if self.plan else []), *self.behind]


def drawn_samples(shapes: Shapes, seed: int) -> list[DrawnSample]:
    """The samples of one step, in a random order."""
    draw, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    plans = [plan_image(*size, "image", shapes.grid) for size in shapes.sizes]
    samples = []
    for plan in (*plans, None):
        length, tokens = (shapes.text, plan.tokens) if plan else (shapes.text_alone, 0)
        text = draw.choices(shapes.words, k=length - (length + tokens) % -shapes.multiple)
        shape = (plan.tiles if plan else 0, 3, shapes.grid.tile_size, shapes.grid.tile_size)
        tiles = torch.rand(shape, generator=noise) * 2 - 1
        samples.append(DrawnSample(text[:16], text[16:], plan, tiles, shapes.image_token))
    draw.shuffle(samples)
    return samples


def packed(samples: Sequence[DrawnSample], shapes: Shapes) -> TextBatch:
    """All samples behind one another in one row."""
    tokens = torch.tensor([token for sample in samples for token in sample.tokens]).unsqueeze(0)
    bounds = np.cumsum([0, *(len(sample.tokens) for sample in samples)])
    is_image = tokens == shapes.image_token
    plans = [sample.plan for sample in samples if sample.plan]
    seen = slice(0, shapes.grid.tokens_per_side * shapes.grid.patch_size)  # what lies behind makes no whole patch
    patches = patch_rows(torch.cat([sample.tiles for sample in samples])[..., seen, seen], shapes.grid.patch_size)
    targets = tokens.masked_fill(is_image, IGNORED)
    return spliced_batch(tokens, targets, is_image.numpy(), plans, patches, torch.from_numpy(bounds.astype(np.int32)))


def padded(samples: Sequence[DrawnSample], shapes: Shapes) -> dict[str, Tensor]:
    """One batch, with at least one image, as transformers' processor and collators make it."""
    longest = max(len(sample.tokens) for sample in samples)
    tokens, mask = torch.zeros(2, len(samples), longest, dtype=torch.int64)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
        mask[row, : len(sample.tokens)] = 1
    with_image = [sample for sample in samples if sample.plan]
    most = max(len(sample.tiles) for sample in with_image)
    pixels = torch.zeros(len(with_image), most, 3, shapes.grid.tile_size, shapes.grid.tile_size)
    for image, sample in zip(pixels, with_image, strict=True):
        image[: len(sample.tiles)] = sample.tiles
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": tokens.masked_fill((mask == 0) | (tokens == shapes.image_token), IGNORED),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([(s.plan.height, s.plan.width) for s in with_image if s.plan]),
        "batch_num_images": torch.tensor([int(sample.plan is not None) for sample in samples]),
    }


def padding_of(samples: Sequence[DrawnSample], batches: Sequence[dict[str, Tensor]]) -> float:
    """The share of the batches' tokens that are padding."""
    return 1 - sum(len(sample.tokens) for sample in samples) / sum(batch["input_ids"].numel() for batch in batches)
