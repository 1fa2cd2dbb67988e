"""The operations counted for a training step against torch's own count, whatever of the model learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import ROWS, aquila_folder, row_of, run_of, start
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.batch import AttendedMedia, TextBatch, next_token_batch, preceding_images
from megavlm.build.costs import Work, part_costs
from megavlm.build.run_config import RunConfig
from megavlm.model.freeze import PARTS_OF_AQUILA_VL, Part
from megavlm.parallel import groups as process_groups
from megavlm.parallel.schedule import forward_backward
from megavlm.testing import spawn
from megavlm.tiles import plan_image

SETS: dict[str, tuple[tuple[Part, ...], ...]] = {
    "decoder": (("decoder",),),
    "infimm": (
        ("cross_attention", "resampler", "new_tokens"),
        ("cross_attention", "resampler"),
        ("cross_attention", "resampler", "decoder"),
        ("cross_attention",),
        ("resampler", "new_tokens"),
        ("decoder",),
    ),
    "aquila_vl": (
        ("projector",),
        PARTS_OF_AQUILA_VL,
        ("projector", "newline"),
        ("tower",),
        ("tower", "decoder"),
        ("decoder",),
        ("newline",),
    ),
}
LENGTHS = (12, 4)
"""Of InfiMM's packed samples: runs of four, which the plain attention to media takes as they are, without padding."""


def count(family: str, weights: str) -> list[tuple[float, float]]:
    """(counted by torch, by us) for each set of what learns."""
    process_groups.join()
    found = []
    for trainable in SETS[family]:
        run = run_of(family, Path(weights), {}).replace(trainable=trainable)
        live = start(run)
        batches, work = WORK[family](run)
        # torch counts the products inside the plain attention kernel, and not those of the CPU's fused one.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            forward_backward(live.chunks, batches, live.groups, live.model.inputs)
        found.append((counter.get_total_flops(), part_costs(run, work).total))
    return found


def infimm_work(run: RunConfig) -> tuple[list[TextBatch], Work]:
    """A packed row, a picture at the start of each sample; attention is counted in full, as its plain kernel works."""
    assert run.infimm is not None
    tower, image = run.infimm.tower, run.infimm.image_token_id
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    tokens = torch.randint(3, 100, (1, sum(LENGTHS)))
    tokens[0, bounds[:-1].long()] = image
    seen, has_image = preceding_images(tokens, image, [1] * len(LENGTHS), bounds)
    patches = torch.randn(len(LENGTHS) * tower.patches, tower.patch_values)
    media = AttendedMedia(patches, (1,) * len(LENGTHS), image_of_token=seen, has_image=has_image)
    text = next_token_batch(tokens, cu_seqlens=bounds)
    batch = TextBatch(text.tokens, text.labels, text.loss_weights, bounds, media)
    pairs = sum(length**2 for length in LENGTHS)
    return [batch], Work(tokens=16, pairs=pairs, tiles=len(LENGTHS), seeing_tokens=16)


def other_work(run: RunConfig) -> tuple[list[TextBatch], Work]:
    """Rows of one sample each, some with a picture."""
    batches = [row_of(run, number) for number in range(ROWS)]
    tokens = batches[0].tokens.size(1)
    tiles = sum(batch.media.images for batch in batches if batch.media)
    if run.aquila_vl is not None:
        assert tiles == 2 * plan_image(120, 60, "image", run.aquila_vl.grid).tiles
    return batches, Work(tokens=ROWS * tokens, pairs=ROWS * tokens**2, tiles=tiles)


WORK: dict[str, Any] = {"decoder": other_work, "infimm": infimm_work, "aquila_vl": other_work}


@pytest.mark.parametrize("family", SETS)
def test_a_training_step_costs_what_torch_counts(family: str, tmp_path: Path) -> None:
    weights = aquila_folder(tmp_path) if family == "aquila_vl" else tmp_path
    (counted,) = spawn(count, 1, family, str(weights))
    assert [ours for _, ours in counted] == [torchs for torchs, _ in counted]
