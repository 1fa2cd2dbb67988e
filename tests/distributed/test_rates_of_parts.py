"""Learning rates of parts reach their parameters alone, under every kind of optimizer; and the table of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megavlm.build.model import build_model
from megavlm.build.run_config import DataParallelConfig, ParallelConfig
from megavlm.model.freeze import part_of
from megavlm.parallel import groups as process_groups
from megavlm.parallel.wrap import wrap_data_parallel
from megavlm.recipes import recipe
from megavlm.testing import spawn
from megavlm.train.optim import build_optimizer, learning_rates
from megavlm.train.table import table, whole_parts

LR, MIN_LR = 1e-2, 2e-3
OWN = {"tower_lr": 2.5e-3, "connector_lr": 2e-2, "cross_attention_lr": 5e-3}


def moved_by_a_step(name: str, parallel: ParallelConfig, distributed: bool, own: dict[str, float]) -> dict[str, float]:
    """Part -> how far its parameters go in Adam's first step, which is the learning rate whatever the gradient."""
    process_groups.join()
    base = recipe(name)
    settings: dict[str, Any] = {"lr_warmup_iters": 0, "lr_warmup_fraction": None, "clip_grad": 0.0, "adam_eps": 1e-12}
    run = base.replace(
        parallel=parallel,
        data_parallel=DataParallelConfig(use_distributed_optimizer=distributed),
        optimizer=base.optimizer.replace(lr=LR, min_lr=MIN_LR, weight_decay=0.0, **settings, **own),
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
    expected = {"": LR} | {name.removesuffix("_lr"): rate for name, rate in own.items()}
    if run.optimizer.lr_decay_style == "cosine":
        expected = {name: rate * MIN_LR / LR for name, rate in expected.items()}
    assert learning_rates(scheduler, run) == pytest.approx(expected)
    assert {round(group["lr"], 9) for group in optimizer.param_groups} <= {round(rate, 9) for rate in expected.values()}
    process_groups.stop()
    return {part: found.pop() for part, found in moved.items()}


AQUILA_VL = {name: OWN[name] for name in ("tower_lr", "connector_lr")}
ALL = {"decoder": LR, "projector": 2e-2, "newline": 2e-2, "tower": 2.5e-3}
INFIMM = {name: OWN[name] for name in ("connector_lr", "cross_attention_lr")} | {"decoder_lr": 1e-3}
ALL_OF_INFIMM = {"decoder": 1e-3, "cross_attention": 5e-3, "resampler": 2e-2}
ONE, STAGES = ParallelConfig(), ParallelConfig(pipeline_model_parallel_size=2)


@pytest.mark.parametrize(
    "name, parallel, distributed, own, expected",
    [
        ("aquila-vl-tiny/2a", ONE, False, AQUILA_VL, [ALL]),
        ("aquila-vl-tiny/2a", ONE, True, AQUILA_VL, [ALL, ALL]),
        ("aquila-vl-tiny/2a", STAGES, True, AQUILA_VL, [ALL, {"decoder": LR}]),
        ("infimm-tiny/finetune", ONE, True, INFIMM, [ALL_OF_INFIMM]),
        ("aquila-vl-tiny/2a", ONE, True, {}, [dict.fromkeys(ALL, LR)]),
    ],
    ids=["plain", "distributed over two ranks", "distributed, two stages", "InfiMM", "none of their own"],
)
def test_parts_have_their_rates(
    name: str, parallel: ParallelConfig, distributed: bool, own: dict[str, float], expected: list[dict[str, float]]
) -> None:
    assert spawn(moved_by_a_step, len(expected), name, parallel, distributed, own) == expected


def tables(degrees: list[dict[str, Any]]) -> list[str]:
    """Of one recipe of each family, in layouts that the joined processes allow."""
    process_groups.join()
    found = []
    for name, own in (("aquila-vl-tiny/2a", {"tower_lr": 1e-6}), ("infimm-tiny/pretrain", {})):
        base = recipe(name).replace(make_vocab_size_divisible_by=136)  # which pads both vocabularies alike for TP=2
        for one in degrees:
            run = base.replace(parallel=ParallelConfig(**one), optimizer=base.optimizer.replace(**own))
            groups = process_groups.start(run.parallel)
            found.append(table(whole_parts(build_model(run, groups), groups), run.optimizer))
            process_groups.stop()
    return found


def test_the_table_counts_the_whole_model_in_every_layout() -> None:
    tp2, pp2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
    ((aquila_vl, infimm),) = spawn(tables, 1, [{}])
    for found in spawn(tables, 4, [tp2, {**tp2, **pp2}, pp2]):
        assert found == [aquila_vl] * 3 + [infimm] * 3
    lines = [line.split() for line in aquila_vl.splitlines()]
    assert [line[0] for line in lines] == ["part", "tower", "projector", "newline", "decoder", "all"]
    rate = f"{recipe('aquila-vl-tiny/2a').optimizer.lr:g}"
    assert lines[1][3] == "1e-06" and lines[4][3] == rate and lines[3][1:3] == ["128", "128"]
    frozen = {line.split()[0]: line.split()[1:] for line in infimm.splitlines()}
    assert frozen["decoder"][1:] == frozen["tower"][1:] == ["0", "frozen"]
    assert frozen["new_tokens"][:2] == ["512", "512"]  # two rows of 128 at either end
