"""The training loop with checkpoints: run again it goes on, whatever moment it was killed at."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from resumed_runs import INTERLEAVED, PP2, TP2, assert_same_tensors, saved_tensors, start
from text_runs import assert_same_end, prepare_text, text_run

from megavlm.build.run_config import CheckpointConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megavlm.checkpoint.atomic import staging_path
from megavlm.checkpoint.shelf import checkpoint_path, steps_saved
from megavlm.cli import main
from megavlm.errors import CheckpointError
from megavlm.parallel import groups as process_groups
from megavlm.recipes import recipe
from megavlm.testing import RankFailed, assert_losses_close, spawn
from megavlm.train import loop
from megavlm.train.callbacks.base import Callback
from megavlm.train.loop import train
from megavlm.train.report import StepReport

STEPS = 8


def run_with(folder: Path, degrees: dict[str, Any] | None = None, steps: int = STEPS, **settings: Any) -> RunConfig:
    run = recipe("decoder-tiny")
    return run.replace(
        parallel=ParallelConfig(**(degrees or {})),
        decoder=run.decoder.replace(hidden_dropout=0.1),
        optimizer=OptimizerConfig(lr=1e-2),
        train=TrainConfig(train_iters=steps, global_batch_size=4, micro_batch_size=1, seq_length=16),
        checkpoint=CheckpointConfig(save_to=str(folder), **{"save_interval": 2, **settings}),
    )


Moment = tuple[Path, float]
"""So many seconds behind the sight of a folder: one that is being written, or one that has its name."""


def train_once(run: RunConfig, moment: Moment | None = None) -> None:
    """The whole command; rank 1 is killed at the moment, if it comes."""
    process_groups.join()
    groups = process_groups.start(run.parallel, run.train.seed)
    if moment is not None and groups.rank == 1:
        threading.Thread(target=kill_at, args=(moment,), daemon=True).start()
    train(run, groups)


def kill_at(moment: Moment) -> None:
    folder, delay = moment
    while not folder.exists():
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)


def random_moment(folder: Path, draw: random.Random) -> Moment:
    """While the next or the next but one checkpoint is saved, or in the step behind it."""
    path = checkpoint_path(folder, max(steps_saved(folder), default=0) + draw.choice([1, 2]))
    return draw.choice([path, staging_path(path)]), draw.choice([0.0, draw.uniform(0.0, 0.1)])


def compare(one: Path, other: Path) -> None:
    process_groups.join()
    start(run_with(one))
    assert_same_tensors(saved_tensors(one), saved_tensors(other))


def same_end(one: Path, other: Path, steps: int = STEPS) -> None:
    spawn(compare, 1, checkpoint_path(one, steps), checkpoint_path(other, steps))


def test_the_same_command_goes_on_where_it_ended(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    spawn(train_once, 2, run_with(whole, TP2, save_interval=None))
    assert steps_saved(whole) == [STEPS]
    spawn(train_once, 2, run_with(halves, TP2, steps=3))
    assert steps_saved(halves) == [2, 3]
    spawn(train_once, 2, run_with(halves, TP2, keep_last=2))
    assert steps_saved(halves) == [6, 8]
    same_end(whole, halves)
    spawn(train_once, 2, run_with(halves, TP2, keep_last=2))  # nothing is left to do
    assert steps_saved(halves) == [6, 8]
    # Another run may start from there; its own folder wins as soon as it holds a checkpoint.
    beside = tmp_path / "beside"
    spawn(train_once, 2, run_with(beside, TP2, steps=9, load_from=str(whole)))
    spawn(train_once, 2, run_with(beside, TP2, steps=10, load_from=str(whole)))
    assert steps_saved(beside) == [9, 10]
    assert steps_saved(whole) == [STEPS]


def test_nothing_to_load_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="--load") as failure:
        spawn(train_once, 1, run_with(tmp_path / "save", load_from=str(tmp_path / "empty")))
    assert isinstance(failure.value.error, CheckpointError)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_text(tmp_path_factory.mktemp("world"))


class Fills(Callback):
    """The disk is full behind step 3."""

    def after_step(self, report: StepReport) -> None:
        if report.iteration == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def train_until_full(run: RunConfig) -> None:
    usual = loop.build_callbacks
    loop.build_callbacks = lambda run, groups: [*usual(run, groups), Fills()]
    train_once(run)


@pytest.mark.parametrize(
    ("failures", "message"), [(2, "2 checkpoints in a row could not be saved"), (9, "the last step, 7, is not saved")]
)
def test_a_disk_that_is_full_stops_no_step(failures: int, message: str, world: Path, tmp_path: Path) -> None:
    """Neither ledger nor log do, and saves only when that many have failed; what fails is not told as saved."""
    log = tmp_path / "log.jsonl"
    options = ["--log-json", str(log), "--log-interval", "1", "--max-save-failures", str(failures)]
    with pytest.raises(RankFailed, match=message) as failed:
        spawn(train_until_full, 1, text_run(world, tmp_path / "save", 7, *options))
    assert isinstance(failed.value.error, CheckpointError) and str(tmp_path / "save") in str(failed.value.error)
    assert steps_saved(tmp_path / "save") == [2]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["kind"] == "save"] == [2]


def kill_then_end(runs: list[RunConfig], draw: random.Random) -> None:
    """Start the same run again and again, each time until it is killed; the last one ends."""
    folder = Path(runs[0].checkpoint.save_to or "")
    *killed, last = runs
    for run in killed:
        with pytest.raises(RankFailed, match="exit code -9"):
            spawn(train_once, 2, run, random_moment(folder, draw), timeout=300)
    spawn(train_once, 2, last, timeout=300)


@pytest.mark.parametrize(
    ("background", "kills"),
    [(True, 2), pytest.param(False, 10, marks=pytest.mark.full), pytest.param(True, 10, marks=pytest.mark.full)],
)
def test_a_run_killed_at_any_moment_ends_the_same(background: bool, kills: int, world: Path, tmp_path: Path) -> None:
    steps, tensor_parallel = 3 * kills, ("--tensor-model-parallel-size", "2")
    spawn(train_once, 2, text_run(world, tmp_path / "whole", steps, *tensor_parallel), timeout=300)
    settings = ["--save-interval", "1", *(["--async-save"] if background else [])]
    run = text_run(world, tmp_path / "killed", steps, *tensor_parallel, *settings)
    kill_then_end([run] * (kills + 1), random.Random(kills))
    assert_same_end(tmp_path / "whole", tmp_path / "killed", steps)


@pytest.mark.full
def test_a_run_killed_in_one_layout_after_another_ends_alike(world: Path, tmp_path: Path) -> None:
    """Ten times; the losses of all steps are those of one process."""
    steps, logs = 24, [tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"]
    same = ["decoder.hidden_dropout=0", "--save-interval", "1", "--log-interval", "1"]
    spawn(train_once, 1, text_run(world, tmp_path / "whole", steps, *same, "--log-json", str(logs[0])), timeout=300)
    base = text_run(world, tmp_path / "killed", steps, *same, "--log-json", str(logs[1]))
    layouts: list[dict[str, Any]] = [TP2, PP2, INTERLEAVED, {}]
    runs = [base.replace(parallel=ParallelConfig(**degrees)) for degrees in layouts]
    kill_then_end([runs[number % 4] for number in range(11)], random.Random(1))
    expected, found = map(losses_of_log, logs)
    assert found.keys() == expected.keys() == set(range(1, steps + 1))
    for step, loss in expected.items():
        assert_losses_close(found[step], loss)
    for save in ("whole", "killed"):
        assert main(["data", "ledger", str(tmp_path / save / "ledger")]) == 0


def losses_of_log(path: Path) -> dict[int, float]:
    """Of each step, as it was computed last."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["iteration"]: line["losses"]["lm loss"] for line in lines if line["kind"] == "step"}
