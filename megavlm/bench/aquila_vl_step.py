"""One training step of a small Aquila-VL on samples of many shapes: ours packed, transformers' in one padded batch.

Both start from the same weights and see the same samples: eight with one image, in the aspect ratios of common cameras,
screens and scans, and one of text alone. All parameters learn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from megavlm.batch import IGNORED, TextBatch
from megavlm.bench.harness import THREADS, Comparison
from megavlm.bench.steps import our_side, their_side
from megavlm.build.from_folder import run_from_folder
from megavlm.build.model import build_model
from megavlm.build.run_config import OptimizerConfig, PrecisionConfig, RunConfig
from megavlm.data.assemble_tables import spliced_batch
from megavlm.parallel import groups as parallel_groups
from megavlm.tiles import GridConfig, ImagePlan, patch_rows, plan_image

TARGET = 0.8
GRID = GridConfig(tile_size=98, max_tiles_per_side=2, cap_tiles=4)
SIZES = ((98, 98), (128, 128), (163, 122), (261, 229), (255, 191), (490, 276), (204, 612), (766, 102))
"""(width, height), a quarter of 384x384, 500x500, 640x480, 1024x899, 1000x750, 1920x1080, 800x2400 and 3000x400."""
TEXT = 64
"""Tokens of text in a sample with an image; the one of text alone has twice as many."""


def model_config(quick: bool) -> LlavaOnevisionConfig:
    """About 20M parameters in the proportions of Aquila-VL-2B; `quick` is a toy."""
    tower, decoder = (1, 2, 96), (1, 2, 128)
    if not quick:
        tower, decoder = (3, 6, 807), (6, 5, 2240)
    (tower_heads, tower_layers, tower_inner), (heads, layers, inner) = tower, decoder
    return LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 72 * tower_heads,
            "intermediate_size": tower_inner,
            "patch_size": GRID.patch_size,
            "image_size": GRID.tile_size,
            "num_hidden_layers": tower_layers,
            "num_attention_heads": tower_heads,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 64 * heads,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 1,
            "vocab_size": 200 if quick else 6000,
            "tie_word_embeddings": True,
        },
        image_token_index=1,
        video_token_index=2,
        tie_word_embeddings=True,
        image_grid_pinpoints=[list(resolution) for resolution in GRID.resolutions],
        vision_aspect_ratio=f"anyres_max_{GRID.cap_tiles}",
    )


@dataclass(frozen=True)
class DrawnSample:
    """Text tokens before and behind an image, if there is one, and its tiles [tiles, 3, H, W]."""

    before: list[int]
    behind: list[int]
    plan: ImagePlan | None
    tiles: Tensor

    @property
    def tokens(self) -> list[int]:
        return [*self.before, *([1] * self.plan.tokens if self.plan else []), *self.behind]


def drawn_samples(vocabulary: int, seed: int) -> list[DrawnSample]:
    """The samples of one step, in a random order."""
    draw, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    samples = []
    for size in (*SIZES, None):
        plan = None if size is None else plan_image(*size, "image", GRID)
        text = draw.choices(range(3, vocabulary), k=TEXT if plan else 2 * TEXT)
        shape = (plan.tiles if plan else 0, 3, GRID.tile_size, GRID.tile_size)
        samples.append(DrawnSample(text[:16], text[16:], plan, torch.rand(shape, generator=noise) * 2 - 1))
    draw.shuffle(samples)
    return samples


def packed(samples: list[DrawnSample]) -> TextBatch:
    """All samples behind one another in one row."""
    tokens = torch.tensor([token for sample in samples for token in sample.tokens]).unsqueeze(0)
    bounds = np.cumsum([0, *(len(sample.tokens) for sample in samples)])
    is_image = tokens == 1
    plans = [sample.plan for sample in samples if sample.plan]
    patches = patch_rows(torch.cat([sample.tiles for sample in samples]), GRID.patch_size)
    targets = tokens.masked_fill(is_image, IGNORED)
    return spliced_batch(tokens, targets, is_image.numpy(), plans, patches, torch.from_numpy(bounds.astype(np.int32)))


def padded(samples: list[DrawnSample]) -> dict[str, Tensor]:
    """One batch as transformers' processor and collators make it."""
    longest = max(len(sample.tokens) for sample in samples)
    tokens, mask = torch.zeros(2, len(samples), longest, dtype=torch.int64)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = torch.tensor(sample.tokens)
        mask[row, : len(sample.tokens)] = 1
    with_image = [sample for sample in samples if sample.plan]
    most = max(len(sample.tiles) for sample in with_image)
    pixels = torch.zeros(len(with_image), most, 3, GRID.tile_size, GRID.tile_size)
    for image, sample in zip(pixels, with_image, strict=True):
        image[: len(sample.tiles)] = sample.tiles
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": tokens.masked_fill((mask == 0) | (tokens == 1), IGNORED),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([(s.plan.height, s.plan.width) for s in with_image if s.plan]),
        "batch_num_images": torch.tensor([int(sample.plan is not None) for sample in samples]),
    }


@contextmanager
def aquila_vl_step(quick: bool) -> Iterator[Comparison]:
    """Both sides in this process, from the same weights."""
    torch.set_num_threads(THREADS)
    disable_progress_bar()
    parallel_groups.join()
    with TemporaryDirectory() as parent:
        torch.manual_seed(1)
        LlavaOnevisionForConditionalGeneration(model_config(quick)).save_pretrained(parent)
        run = _run_of(Path(parent))
        groups = parallel_groups.start(run.parallel, run.train.seed)
        ours = build_model(run, groups)
        theirs = LlavaOnevisionForConditionalGeneration.from_pretrained(
            parent, dtype=torch.float32, attn_implementation="sdpa"
        )
    vocabulary = run.decoder.vocab_size
    try:
        yield Comparison(
            benchmark="aquila-vl-step",
            case=f"{theirs.num_parameters() / 1e6:.1f}M Aquila-VL, float32, {_about(drawn_samples(vocabulary, 0))}",
            ours=our_side(ours, run, groups, (packed(drawn_samples(vocabulary, seed)) for seed in _from_zero())),
            theirs=their_side(
                theirs.to(groups.device),
                run,
                groups,
                (padded(drawn_samples(vocabulary, seed)) for seed in _from_zero()),
            ),
            target=TARGET,
            rounds=3 if quick else 20,
            warmup=1 if quick else 3,
        )
    finally:
        parallel_groups.stop()


def _run_of(folder: Path) -> RunConfig:
    return run_from_folder(folder).replace(
        precision=PrecisionConfig(params_dtype="float32"), optimizer=OptimizerConfig(lr=1e-4)
    )


def _about(samples: list[DrawnSample]) -> str:
    """What a step computes, and what of it is padding."""
    real = sum(len(sample.tokens) for sample in samples)
    rows = padded(samples)["input_ids"].numel()
    tiles = sum(len(sample.tiles) for sample in samples)
    return (
        f"{len(samples)} samples of {real} tokens and {tiles} tiles; "
        f"padding 0.0 % in our packed row, {100 * (1 - real / rows):.1f} % of the tokens in the padded batch"
    )


def _from_zero() -> Iterator[int]:
    seed = 0
    while True:
        yield seed
        seed += 1
