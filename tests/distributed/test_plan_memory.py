"""What a plan says of a rank's memory, against the storages of real ranks: bytes that stay, and the peak of a step."""

from __future__ import annotations

from typing import Any

import pytest

from megavlm.build.run_config import RunConfig
from megavlm.parallel import groups as process_groups
from megavlm.plan.rows import PlannedDocument, PlannedRow, batch_of
from megavlm.plan.stage import profile_run
from megavlm.plan.static import static_bytes
from megavlm.plan.trace import build_rank, own_pictures
from megavlm.recipes import RECIPES, recipe
from megavlm.testing import spawn
from megavlm.tiles import GridConfig, plan_image
from megavlm.train.step import train_step

MICROBATCHES = 4
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP=2": (2, TP2),
    "TP=2 SP": (2, {**TP2, "sequence_parallel": True}),
    "PP=2": (2, PP2),
    "PP=2 interleaved": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}),
    "PP=2, no layers in front": (2, {**PP2, "pipeline_model_parallel_layout": "E|ttttL"}),
    "DP=2": (2, {}),
    "TP=2 PP=2": (4, {**TP2, **PP2}),
    "DP=2 TP=2": (4, TP2),
}
CASES = [
    *(("infimm-tiny/pretrain", layout) for layout in ("one process", "TP=2", "PP=2", "TP=2 PP=2")),
    *(("aquila-vl-tiny/2b", layout) for layout in ("TP=2 SP", "PP=2 interleaved", "DP=2")),
    ("aquila-vl-tiny/2b", "PP=2, no layers in front"),
    *((f"aquila-vl-tiny/{stage}", "PP=2, no layers in front") for stage in ("1", "2a")),
]
STAGES = [name for name in RECIPES if name.startswith(("infimm-tiny/", "aquila-vl-tiny/"))]
MORE = [(name, layout) for name in STAGES for layout in LAYOUTS if (name, layout) not in CASES]


def run_of(name: str, degrees: dict[str, Any]) -> RunConfig:
    run = recipe(name)
    return run.replace(parallel=run.parallel.replace(**degrees))


def row_of(run: RunConfig) -> PlannedRow:
    """Five documents, of which four have pictures of different sizes, and padding."""
    if run.infimm is not None:
        tower = run.infimm.tower
        grid = GridConfig(tile_size=tower.image_size, patch_size=tower.patch_size, tiling="single")
    else:
        assert run.aquila_vl is not None
        grid = run.aquila_vl.grid
    pictures = [(), *((plan_image(40 * one, 50, "image", grid),) for one in range(1, 5))]
    documents = tuple(PlannedDocument(30 + sum(p.tokens for p in own), own) for own in pictures)
    used = sum(document.tokens for document in documents)
    return PlannedRow(documents, used + 32 - used % 16)


def real(name: str, degrees: dict[str, Any]) -> tuple[int, bool, tuple[int, ...], int]:
    """Of this rank: (stage, whether it is the first of it, bytes that stay, peak of its second step)."""
    process_groups.join()
    run = run_of(name, degrees)
    groups = process_groups.start(run.parallel, run.train.seed)
    rank = build_rank(run, groups)
    row = row_of(run)
    for _ in range(2):
        batches = [batch_of(run, row, own_pictures(rank.model)) for _ in range(MICROBATCHES)]
        follower = rank.follower()
        with follower:
            train_step(rank.wrapped, rank.optimizer, batches, groups, rank.model.inputs)
    stays = tuple(static_bytes(rank.model.parts(), rank.optimizer))
    is_first = groups.data_rank == groups.tensor_rank == 0
    return groups.pipeline_rank, is_first, stays, follower.peak


def planned(cases: list[tuple[str, str]]) -> dict[tuple[str, str], list[tuple[tuple[int, ...], int]]]:
    """For each recipe and layout: of each stage, the same."""
    found: dict[tuple[str, str], list[tuple[tuple[int, ...], int]]] = {}
    for name, layout in cases:
        world, degrees = LAYOUTS[layout]
        run = run_of(name, degrees)
        row = row_of(run)
        profiles = profile_run(run, world, MICROBATCHES, {"mean": row, "worst": row})
        memories = [profile.mean.memory for profile in profiles]
        found[name, layout] = [((m.weights, m.gradients, m.optimizer), m.activations) for m in memories]
    return found


def compare(cases: list[tuple[str, str]]) -> None:
    (plans,) = spawn(planned, 1, cases, timeout=600)
    for name, layout in cases:
        world, degrees = LAYOUTS[layout]
        for rank, (stage, is_first, stays, peak) in enumerate(spawn(real, world, name, degrees)):
            planned_bytes, planned_peak = plans[name, layout][stage]
            where = f"{name} {layout} rank {rank}"
            assert stays[:2] == planned_bytes[:2], where
            if is_first:  # which the plan is of: it has most images
                assert stays == planned_bytes, where
                assert planned_peak == pytest.approx(peak, rel=0.05), where
            else:
                assert stays[2] == pytest.approx(planned_bytes[2], rel=0.01), where
                assert peak <= 1.05 * planned_peak, where


def test_memory_of_each_rank_is_as_planned() -> None:
    compare(CASES)


@pytest.mark.full
def test_memory_of_each_rank_is_as_planned_for_all_stages() -> None:
    compare(MORE)
