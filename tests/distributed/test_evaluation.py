"""An evaluation in between leaves training as it is; and what is frozen is held against what it was."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import DISTRIBUTED, OVERLAPPED, PP2, TP2, TP2_SP, row_of, run_of, start
from torch import Tensor

from megavlm.build.run_config import DataParallelConfig, ParallelConfig, RunConfig
from megavlm.checkpoint.generators import generator_states
from megavlm.errors import CheckpointError
from megavlm.parallel import groups as process_groups
from megavlm.recipes import recipe
from megavlm.testing import RankFailed, assert_losses_close, spawn
from megavlm.train import loop
from megavlm.train.callbacks.base import Callback
from megavlm.train.checkpointing import Checkpointing
from megavlm.train.feed import FedStep
from megavlm.train.report import RunStart, StepReport
from megavlm.train.work import work_of_rows

STEPS = 6


class Recorder(Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.evaluations: dict[int, float] = {}

    def after_step(self, report: StepReport) -> None:
        self.steps.append((report.losses["lm loss"], report.grad_norm))

    def evaluated(self, iteration: int, losses: Any) -> None:
        self.evaluations[iteration] = losses["lm loss"]


def small_run(degrees: dict[str, Any], data_parallel: DataParallelConfig, eval_interval: int | None) -> RunConfig:
    run = recipe("decoder-tiny")
    return run.replace(
        decoder=run.decoder.replace(hidden_dropout=0.1),
        parallel=ParallelConfig(**degrees),
        data_parallel=data_parallel,
        train=run.train.replace(
            train_iters=STEPS, global_batch_size=8, micro_batch_size=2, eval_interval=eval_interval, eval_iters=3
        ),
    )


def recorded(run: RunConfig) -> tuple[Recorder, dict[str, Tensor]]:
    """A run, and the weights and generators that it ends with."""
    groups = process_groups.start(run.parallel, run.train.seed)
    recorder = Recorder()
    loop.build_callbacks = lambda run, groups: [recorder]
    model = loop.train(run, groups).model
    bits = {name: p.detach().clone() for part in model.parts() for name, p in part.named_parameters()}
    bits |= {f"generator {name}": state.clone() for name, state in generator_states(groups.device).items()}
    process_groups.stop()
    return recorder, bits


def compare(degrees: dict[str, Any], data_parallel: DataParallelConfig) -> Any:
    process_groups.join()
    plain, expected = recorded(small_run(degrees, data_parallel, None))
    found, bits = recorded(small_run(degrees, data_parallel, 2))
    assert plain.evaluations == {} and list(found.evaluations) == [2, 4, 6]
    assert found.steps == plain.steps
    for name, tensor in expected.items():
        assert torch.equal(tensor, bits[name]), name
    return list(found.evaluations.values())


@pytest.mark.parametrize(
    ("world_size", "degrees", "data_parallel"),
    [
        (2, {}, OVERLAPPED),
        (2, TP2_SP, DISTRIBUTED),
        (4, {**PP2, "virtual_pipeline_model_parallel_size": 2}, OVERLAPPED),
    ],
    ids=["DP=2, overlapped", "TP=2 with SP", "DP=2 x interleaved PP=2, overlapped"],
)
def test_training_is_the_same_with_evaluation(
    world_size: int, degrees: dict[str, Any], data_parallel: DataParallelConfig
) -> None:
    found = spawn(compare, world_size, degrees, data_parallel, timeout=300)
    first, _, last = found[-1]
    assert last < first < 1.5 * math.log(100)


def evaluate_alone(degrees: dict[str, Any]) -> list[float]:
    """Without dropout in training, so that layouts are alike; with `log` lines of the rank that speaks."""
    process_groups.join()
    run = small_run(degrees, DISTRIBUTED, 3)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megavlm").setLevel(logging.INFO)
    logging.getLogger("megavlm").addHandler(handler)
    groups = process_groups.start(run.parallel, run.train.seed)
    loop.train(run.replace(decoder=run.decoder.replace(hidden_dropout=0.0)), groups)
    printed = [line.split("|") for line in lines if line.startswith(" validation loss at iteration")]
    assert [line[0].split()[-1] for line in printed] == (["3", "6"] if groups.speaks else [])
    losses = [float(line[1].split(":")[1]) for line in printed]
    for line, loss in zip(printed, losses, strict=True):
        assert float(line[2].split(":")[1]) == pytest.approx(math.exp(loss), rel=1e-5)
    return losses


def test_evaluations_are_alike_in_every_layout() -> None:
    ((first, last),) = spawn(evaluate_alone, 1, {})
    (found,) = filter(None, spawn(evaluate_alone, 4, {**PP2, "tensor_model_parallel_size": 2}, timeout=300))
    assert_losses_close(found[0], first)
    assert_losses_close(found[1], last)


def change_a_frozen_bit(run: RunConfig) -> None:
    """On one rank, in the middle of training."""
    process_groups.join()
    live = start(run)
    checkpointing = Checkpointing(run, live.state)
    live.steps(0, 2)
    checkpointing.check_frozen()
    if live.groups.rank == 1:
        weight = next(p for p in live.model.chunks[0].parameters() if not p.requires_grad)
        weight.data.flatten()[7:8].view(torch.int32).bitwise_xor_(1)
    checkpointing.check_frozen()


class ChangesAFrozenBit(Callback):
    def start(self, start: RunStart) -> None:
        weight = next(p for p in start.model.chunks[0].parameters() if not p.requires_grad)
        weight.data.flatten()[7:8].view(torch.int32).bitwise_xor_(1)


def stop_with_a_changed_bit(run: RunConfig) -> None:
    process_groups.join()
    loop.build_callbacks = lambda run, groups: [ChangesAFrozenBit()]
    step = FedStep(1, [row_of(run, 1)], work_of_rows(1, 8), None, [["row"]], lambda: ["row"])
    loop.feed = lambda *arguments: iter([step, step])
    loop.train(run, process_groups.start(run.parallel, run.train.seed))


def test_a_changed_bit_is_an_error_for_a_run_that_stops(tmp_path: Path) -> None:
    run = run_of("infimm", tmp_path, {})
    run = run.replace(train=run.train.replace(exit_interval=1))
    with pytest.raises(RankFailed, match="changed in training, one of 1") as failed:
        spawn(stop_with_a_changed_bit, 1, run)
    assert isinstance(failed.value.error, CheckpointError)


def test_a_changed_bit_of_a_frozen_weight_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="changed in training, one of 1") as failed:
        spawn(change_a_frozen_bit, 2, run_of("infimm", tmp_path, TP2), timeout=300)
    assert isinstance(failed.value.error, CheckpointError)
