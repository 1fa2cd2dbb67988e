"""A loss or gradient that is not finite changes no weight and no state, is named by its samples, and stops a run."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import (
    DISTRIBUTED,
    OVERLAPPED,
    PLAIN,
    PP2,
    ROWS,
    TP2,
    Live,
    assert_same_bits,
    fingerprint,
    infimm_row,
    run_of,
    start,
)

from megavlm.batch import TextBatch
from megavlm.build.run_config import RunConfig
from megavlm.cli import main
from megavlm.errors import DivergedError
from megavlm.parallel import groups as process_groups
from megavlm.parallel.wrap import gather_parameters
from megavlm.recipes import recipe
from megavlm.testing import spawn
from megavlm.train import loop
from megavlm.train.callbacks.base import Callback
from megavlm.train.feed import FedStep, feed
from megavlm.train.report import StepReport
from megavlm.train.step import StepResult, train_step


def poisoned_rows(live: Live, number: int) -> list[TextBatch]:
    """A step's rows, in one of which a picture's pixels are infinite."""
    rows = range(live.groups.data_rank, ROWS, live.groups.data_size)
    batches = [infimm_row(live.run, (100 * number + row) % 3, 100 * number + row) for row in rows]
    if 1 in rows:
        batch = batches[list(rows).index(1)]
        assert batch.media is not None and batch.media.images > 0
        batch.media.patches[5, 3] = torch.inf
    return batches


def step_on(live: Live, batches: list[TextBatch]) -> StepResult:
    return train_step(live.chunks, live.state.optimizer, batches, live.groups, live.model.inputs)


def poison_a_picture(run: RunConfig) -> Any:
    """One rank alone sees the picture."""
    process_groups.join()
    live = start(run)
    live.steps(0, 2)
    gather_parameters(live.chunks)
    before = fingerprint(live)
    result = step_on(live, poisoned_rows(live, 4))
    assert not result.applied and not result.loss_is_finite
    assert_same_bits(fingerprint(live), before)
    after = live.steps(2, 4)
    gather_parameters(live.chunks)
    bits = fingerprint(live)
    other = start(run)  # which never met it
    other.steps(0, 2)
    assert other.steps(2, 4) == after
    gather_parameters(other.chunks)
    assert_same_bits(fingerprint(other), bits)
    return result.first_bad


@pytest.mark.parametrize(
    ("world_size", "degrees", "data_parallel", "dtype", "where"),
    [
        (1, {}, PLAIN, "float32", [1]),
        (2, {}, OVERLAPPED, "bfloat16", [None, 0]),
        (2, {}, PLAIN, "bfloat16", [None, 0]),
        (4, {**TP2, **PP2}, DISTRIBUTED, "float32", [None, None, 1, 1]),
    ],
    ids=["one process", "DP=2, overlapped", "DP=2, masters", "TP=2 x PP=2"],
)
def test_a_poisoned_picture_changes_nothing(
    world_size: int, degrees: dict[str, Any], data_parallel: Any, dtype: str, where: list[int | None], tmp_path: Path
) -> None:
    run = run_of("infimm, all", tmp_path, degrees, data_parallel, dtype)
    assert spawn(poison_a_picture, world_size, run, timeout=300) == where


def break_a_weight(run: RunConfig, rank: int) -> None:
    """On one rank, whose part of a replicated or sliced layer is then wrong for one step."""
    process_groups.join()
    live = start(run)
    live.steps(0, 2)
    before = fingerprint(live)
    weight = next(p for name, p in live.model.chunks[0].named_parameters() if name.endswith("mlp.linear_fc2.weight"))
    kept = weight.detach().clone()
    if live.groups.rank == rank:
        weight.data[3, 2] = torch.inf
    rows = [infimm_row(run, 0, row) for row in range(live.groups.data_rank, ROWS, live.groups.data_size)]
    assert not step_on(live, rows).applied
    weight.data.copy_(kept)
    assert_same_bits(fingerprint(live), before)


@pytest.mark.parametrize(("world_size", "degrees"), [(4, {**TP2, **PP2}), (2, {})], ids=["TP=2 x PP=2", "DP=2"])
def test_a_broken_weight_of_one_rank_changes_nothing(world_size: int, degrees: dict[str, Any], tmp_path: Path) -> None:
    run = run_of("infimm, all", tmp_path, degrees, PLAIN)
    spawn(break_a_weight, world_size, run, world_size - 1, timeout=300)


class Recorder(Callback):
    """Keeps the reports."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def after_step(self, report: StepReport) -> None:
        self.reports.append(report)


def train_with_bad_steps(bad: list[int], settings: dict[str, Any]) -> Any:
    """The loop, where the second data-parallel rank's last row weighs infinitely much in some steps."""
    process_groups.join()
    run = recipe("decoder-tiny")
    train = run.train.replace(train_iters=6, global_batch_size=8, micro_batch_size=2, seq_length=16, **settings)
    groups = process_groups.start(run.parallel, run.train.seed)

    def poisoned(*arguments: Any) -> Iterator[FedStep]:
        for step in feed(*arguments):
            *others, last = step.batches
            if step.iteration in bad and groups.data_rank == 1:
                last = replace(last, loss_weights=last.loss_weights * torch.inf)
            yield replace(step, batches=[*others, last])

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megavlm").addHandler(handler)
    recorder = Recorder()
    loop.feed = poisoned  # type: ignore[assignment]
    loop.build_callbacks = lambda run, groups: [recorder]
    error = None
    try:
        loop.train(run.replace(train=train), groups)
    except DivergedError as raised:
        error = str(raised)
    return error, recorder.reports, [line for line in lines if "finite" in line]


def test_bad_steps_are_counted_and_named() -> None:
    (error, reports, lines), (_, others, silent) = spawn(train_with_bad_steps, 2, [2, 3, 5], {}, timeout=300)
    assert error is None and silent == []
    assert [(one.applied, one.skipped, one.nan) for one in reports] == [
        (True, 0, 0),
        (False, 1, 1),
        (False, 2, 2),
        (True, 2, 2),
        (False, 3, 3),
        (True, 3, 3),
    ]
    assert [one.applied for one in others] == [one.applied for one in reports]
    rates = [one.learning_rates[""] for one in reports]
    assert rates[1] == rates[2] == rates[3] < rates[4]  # the schedule waits with the weights
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 3", "step 5"]
    assert "1 in a row, the run stops at 3" in lines[0] and "2 in a row" in lines[1] and "1 in a row" in lines[2]
    assert "first in microbatch 2 of data-parallel rank 1: toy text:5, toy text:7;" in lines[0]
    assert "rank 0" not in lines[0]
    assert all(f"toy text:{row}" in lines[0] for row in range(8))


def test_too_many_in_a_row_stop_the_run() -> None:
    found = spawn(train_with_bad_steps, 2, [2, 4, 5], {"max_nan_iterations": 2}, timeout=300)
    for error, reports, _ in found:
        assert error is not None and error.startswith("steps = [4, 5]") and "--max-nan-iterations" in error
        assert [one.iteration for one in reports] == [1, 2, 3, 4, 5]


def run_command(arguments: list[str]) -> tuple[int, str]:
    """(exit code, what it wrote to standard error)."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        return main(arguments), errors.getvalue()


def test_a_diverging_command_ends_in_one_line() -> None:
    """Nothing is injected: the first update makes all weights too large to compute with."""
    options = ["--lr", "1e30", "--lr-warmup-iters", "0", "--clip-grad", "0", "--global-batch-size", "8"]
    outcomes = spawn(run_command, 2, ["train", "decoder-tiny", *options], timeout=300)
    assert [code for code, _ in outcomes] == [2, 2]
    texts = [text for _, text in outcomes]
    assert "megavlm: error: steps = [2, 3, 4]: " in texts[0].splitlines()[-1] and texts[1] == ""
    assert texts[0].count("not finite, so no weight was changed") == 3
