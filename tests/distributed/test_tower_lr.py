"""The vision tower's own learning rate reaches its parameters, and no others, under every kind of optimizer."""

from __future__ import annotations

import pytest
import torch

from megavlm.build.model import build_model
from megavlm.build.run_config import DataParallelConfig, ParallelConfig
from megavlm.model.freeze import part_of
from megavlm.parallel import groups as process_groups
from megavlm.parallel.wrap import wrap_data_parallel
from megavlm.recipes import recipe
from megavlm.testing import spawn
from megavlm.train.optim import build_optimizer

LR, MIN_LR, TOWER_LR = 1e-2, 2e-3, 2.5e-3


def moved_by_one_step(parallel: ParallelConfig, distributed: bool, tower_lr: float | None) -> dict[str, float]:
    """Part -> how far its parameters go in Adam's first step, which is the learning rate whatever the gradient."""
    process_groups.join()
    base = recipe("aquila-vl-tiny/2a")
    run = base.replace(
        parallel=parallel,
        data_parallel=DataParallelConfig(use_distributed_optimizer=distributed),
        optimizer=base.optimizer.replace(
            lr=LR, min_lr=MIN_LR, tower_lr=tower_lr, lr_warmup_fraction=None, clip_grad=0.0, adam_eps=1e-12
        ),
    )
    groups = process_groups.start(run.parallel)
    chunks = wrap_data_parallel(list(build_model(run, groups).chunks), run.data_parallel)
    optimizer, scheduler = build_optimizer(chunks, run)
    parameters = {name: p for chunk in chunks for name, p in chunk.module.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        draw = torch.Generator().manual_seed(len(name))
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=draw))
    assert optimizer.step()[0]
    moved: dict[str, set[float]] = {}
    for name, parameter in parameters.items():
        far = (parameter.detach() - before[name]).abs()
        assert far.max() - far.min() < 1e-5, name
        moved.setdefault(part_of(name), set()).add(round(float(far.mean()), 5))
    assert all(len(found) == 1 for found in moved.values()), moved
    scheduler.step(increment=run.train.train_iters)
    lowest = {group["lr"] for group in optimizer.param_groups}
    expected = {MIN_LR} if tower_lr is None else {MIN_LR, MIN_LR * tower_lr / LR}
    assert {round(rate, 9) for rate in lowest} == expected
    process_groups.stop()
    return {part: found.pop() for part, found in moved.items()}


ALL = {"decoder": LR, "projector": LR, "newline": LR, "tower": TOWER_LR}
ONE, STAGES = ParallelConfig(), ParallelConfig(pipeline_model_parallel_size=2)


@pytest.mark.parametrize(
    "parallel, distributed, expected",
    [(ONE, False, [ALL]), (ONE, True, [ALL, ALL]), (STAGES, True, [ALL, {"decoder": LR}])],
    ids=["plain", "distributed over two ranks", "distributed, two stages"],
)
def test_only_the_tower_has_its_rate(
    parallel: ParallelConfig, distributed: bool, expected: list[dict[str, float]]
) -> None:
    assert spawn(moved_by_one_step, len(expected), parallel, distributed, TOWER_LR) == expected


def test_without_one_all_parts_have_the_same() -> None:
    (found,) = spawn(moved_by_one_step, 1, ONE, True, None)
    assert found == {**ALL, "tower": LR}
