"""One training step of a small Aquila-VL on samples of many shapes: ours packed, transformers' in one padded batch.

Both start from the same weights and see the same samples: eight with one image, in the aspect ratios of common cameras,
screens and scans, and one of text alone. All parameters learn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from megavlm.bench.aquila_vl_samples import Shapes, drawn_samples, packed, padded, padding_of
from megavlm.bench.harness import THREADS, Comparison
from megavlm.bench.steps import our_side, their_side
from megavlm.build.from_folder import run_from_folder
from megavlm.build.model import build_model
from megavlm.build.run_config import OptimizerConfig, PrecisionConfig, RunConfig
from megavlm.parallel import groups as parallel_groups
from megavlm.tiles import GridConfig

TARGET = 0.8
IMAGE_TOKEN = 1
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
        image_token_index=IMAGE_TOKEN,
        video_token_index=2,
        tie_word_embeddings=True,
        image_grid_pinpoints=[list(resolution) for resolution in GRID.resolutions],
        vision_aspect_ratio=f"anyres_max_{GRID.cap_tiles}",
    )


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
    shapes = Shapes(GRID, SIZES, TEXT, 2 * TEXT, IMAGE_TOKEN, range(3, run.decoder.vocab_size))
    try:
        yield Comparison(
            benchmark="aquila-vl-step",
            case=f"{theirs.num_parameters() / 1e6:.1f}M Aquila-VL, float32, {_about(shapes)}",
            ours=our_side(ours, run, groups, ([packed(drawn_samples(shapes, n), shapes)] for n in count())),
            theirs=their_side(
                theirs.to(groups.device),
                run.optimizer,
                groups.device,
                ([padded(drawn_samples(shapes, n), shapes)] for n in count()),
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


def _about(shapes: Shapes) -> str:
    """What a step computes, and what of it is padding."""
    samples = drawn_samples(shapes, 0)
    real, tiles = sum(len(sample.tokens) for sample in samples), sum(len(sample.tiles) for sample in samples)
    return (
        f"{len(samples)} samples of {real} tokens and {tiles} tiles; padding 0.0 % in our packed row, "
        f"{100 * padding_of(samples, [padded(samples, shapes)]):.1f} % of the tokens in the padded batch"
    )
