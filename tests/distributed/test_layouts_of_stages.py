"""Every stage of both tiny recipes, 20 steps through the training loop's own parts, alike in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from resumed_runs import INTERLEAVED, PP2, TP2, TP2_SP
from tiny_stages import STAGES, prepare_stages, tiny_stage

from megavlm.build.run_config import check_for_world
from megavlm.parallel import groups as process_groups
from megavlm.testing import assert_losses_close, spawn
from megavlm.train.feed import feed
from megavlm.train.training import build_training

STEPS = 20
Steps = list[tuple[dict[str, float], float]]
"""(losses, norm of the gradient) of each."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP=2": (2, TP2),
    "TP=2 with SP": (2, TP2_SP),
    "PP=2": (2, PP2),
    "interleaved PP=2": (2, INTERLEAVED),
    "DP=2": (2, {}),
    "TP=2 x PP=2": (4, {**TP2, **PP2}),
    "DP=2 x TP=2": (4, TP2),
}
COVER = {
    "TP=2": ["aquila-vl-tiny/2b"],
    "TP=2 with SP": ["infimm-tiny/finetune"],
    "PP=2": ["infimm-tiny/pretrain"],
    "interleaved PP=2": ["aquila-vl-tiny/2a"],
    "DP=2": ["aquila-vl-tiny/1", "aquila-vl-tiny/4"],
    "TP=2 x PP=2": ["aquila-vl-tiny/3", "infimm-tiny/multitask"],
    "DP=2 x TP=2": ["aquila-vl-tiny/2c"],
}
"""Each stage in one layout; CI's share."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_stages(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, Steps]:
    """What one process computes."""
    (found,) = spawn(train, 1, str(root), STAGES, {}, timeout=900)
    return found


def train(root: str, stages: list[str], degrees: dict[str, Any]) -> dict[str, Steps] | None:
    """On the rank that speaks."""
    world_size = process_groups.join()
    found: dict[str, Steps] = {}
    for stage in stages:
        run = tiny_stage(stage, Path(root), degrees)
        run = run.replace(train=run.train.replace(train_iters=STEPS))
        check_for_world(run, world_size)
        groups = process_groups.start(run.parallel, run.train.seed)
        training = build_training(run, groups)
        weights = [p for chunk in training.model.chunks for p in chunk.parameters() if p.requires_grad]
        before = [weight.detach().clone() for weight in weights]
        results = [training.step(step, stop=0) for step in feed(run, training.model, groups, 0)]
        moved = sum(not weight.equal(old) for weight, old in zip(weights, before, strict=True))
        assert moved >= 0.9 * len(weights), f"{stage}: of {len(weights)} tensors {moved} were trained"
        found[stage] = [(dict(result.losses), result.grad_norm) for result in results]
        process_groups.stop()
    return found if groups.speaks else None


def assert_alike(root: Path, alone: dict[str, Steps], layout: str, stages: list[str]) -> None:
    world_size, degrees = LAYOUTS[layout]
    (found,) = filter(None, spawn(train, world_size, str(root), stages, degrees, timeout=900))
    for stage in stages:
        for (losses, norm), (expected_losses, expected_norm) in zip(found[stage], alone[stage], strict=True):
            assert losses.keys() == expected_losses.keys()
            for name, loss in losses.items():
                assert_losses_close(loss, expected_losses[name])
            assert_losses_close(norm, expected_norm, tolerance=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_are_alike_in_a_layout_each(layout: str, root: Path, alone: dict[str, Steps]) -> None:
    assert sorted(stage for stages in COVER.values() for stage in stages) == sorted(STAGES)
    assert_alike(root, alone, layout, COVER[layout])


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_stages_are_alike_in_every_layout(layout: str, root: Path, alone: dict[str, Steps]) -> None:
    assert_alike(root, alone, layout, [stage for stage in STAGES if stage not in COVER[layout]])
