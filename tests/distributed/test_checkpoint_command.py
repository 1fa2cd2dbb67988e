"""The training loop with checkpoints: run again it goes on, whatever moment it was killed at."""

from __future__ import annotations

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

from megavlm.build.run_config import CheckpointConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from megavlm.checkpoint.manager import CheckpointManager
from megavlm.checkpoint.shelf import checkpoint_path, steps_saved
from megavlm.errors import CheckpointError
from megavlm.parallel import groups as process_groups
from megavlm.recipes import recipe
from megavlm.testing import RankFailed, spawn
from megavlm.train.loop import train

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


def train_once(run: RunConfig, kill_after: float | None = None) -> None:
    """The whole command; rank 1 may be killed after some seconds of it."""
    process_groups.join()
    groups = process_groups.start(run.parallel, run.train.seed)
    if kill_after is not None and groups.rank == 1:
        threading.Thread(target=kill_soon, args=(kill_after,), daemon=True).start()
    train(run, groups)


def kill_soon(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


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


def train_without_room(run: RunConfig) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    train_once(run)


@pytest.mark.parametrize(
    ("failures", "message"), [(3, "3 checkpoints in a row could not be saved"), (9, "the last step, 8, is not saved")]
)
def test_a_run_without_room_ends_in_an_error(failures: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=message):
        spawn(train_without_room, 1, run_with(tmp_path / "full", max_save_failures=failures))


def kill_until_done(run: RunConfig, draw: random.Random, kills: int, longest: float) -> int:
    """Start the run again and again; how often it was killed."""
    killed = 0
    for _ in range(kills):
        try:
            spawn(train_once, 2, run, draw.uniform(0.0, longest))
            break
        except RankFailed as failure:
            assert "exit code -9" in str(failure), failure
            killed += 1
    spawn(train_once, 2, run)
    return killed


def time_of(run: RunConfig) -> float:
    began = time.monotonic()
    spawn(train_once, 2, run)
    return time.monotonic() - began


@pytest.mark.parametrize(
    ("background", "kills"),
    [(True, 3), pytest.param(False, 10, marks=pytest.mark.full), pytest.param(True, 10, marks=pytest.mark.full)],
)
def test_a_run_killed_at_any_moment_ends_the_same(background: bool, kills: int, tmp_path: Path) -> None:
    longest = time_of(run_with(tmp_path / "whole", TP2, save_interval=1))
    run = run_with(tmp_path / "killed", TP2, save_interval=1, async_save=background)
    assert kill_until_done(run, random.Random(kills), kills, 0.8 * longest) > 0
    same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.full
def test_a_killed_run_goes_on_in_other_layouts(tmp_path: Path) -> None:
    draw = random.Random(1)
    without_dropout = recipe("decoder-tiny").decoder
    for degrees in (TP2, PP2, INTERLEAVED, {}):
        run = run_with(tmp_path / "killed", degrees, save_interval=1).replace(decoder=without_dropout)
        kill_until_done(run.replace(train=run.train.replace(train_iters=STEPS)), draw, 1, 2.0)
    spawn(load_end, 1, run_with(tmp_path / "killed").replace(decoder=without_dropout), tmp_path / "killed")


def load_end(run: RunConfig, folder: Path) -> None:
    process_groups.join()
    assert CheckpointManager(folder).load_latest(start(run).state) == STEPS
