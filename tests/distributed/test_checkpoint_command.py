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
from megavlm.checkpoint.atomic import staging_path
from megavlm.checkpoint.manager import CheckpointManager
from megavlm.checkpoint.shelf import checkpoint_path, steps_saved
from megavlm.errors import CheckpointError
from megavlm.parallel import groups as process_groups
from megavlm.recipes import recipe
from megavlm.testing import RankFailed, assert_losses_close, spawn
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


def train_without_room(run: RunConfig) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    train_once(run)


@pytest.mark.parametrize(
    ("failures", "message"), [(3, "3 checkpoints in a row could not be saved"), (9, "the last step, 8, is not saved")]
)
def test_a_run_without_room_ends_in_an_error(failures: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=message):
        spawn(train_without_room, 1, run_with(tmp_path / "full", max_save_failures=failures))


def kill_then_end(run: RunConfig, draw: random.Random, kills: int) -> None:
    """Start the run again and again, each time until it is killed, then let it end."""
    folder = Path(run.checkpoint.save_to or "")
    for _ in range(kills):
        with pytest.raises(RankFailed, match="exit code -9"):
            spawn(train_once, 2, run, random_moment(folder, draw))
    spawn(train_once, 2, run)


@pytest.mark.parametrize(
    ("background", "kills"),
    [(True, 2), pytest.param(False, 10, marks=pytest.mark.full), pytest.param(True, 10, marks=pytest.mark.full)],
)
def test_a_run_killed_at_any_moment_ends_the_same(background: bool, kills: int, tmp_path: Path) -> None:
    steps = 3 * kills
    spawn(train_once, 2, run_with(tmp_path / "whole", TP2, steps, save_interval=None))
    run = run_with(tmp_path / "killed", TP2, steps, save_interval=1, async_save=background)
    kill_then_end(run, random.Random(kills), kills)
    same_end(tmp_path / "whole", tmp_path / "killed", steps)


@pytest.mark.full
def test_a_killed_run_goes_on_in_other_layouts(tmp_path: Path) -> None:
    draw = random.Random(1)
    losses = []
    for folder, kills in (("whole", 0), ("killed", 2)):
        for number, degrees in enumerate((TP2, PP2, INTERLEAVED, {})):
            run = run_with(tmp_path / folder, degrees if kills else TP2, 6 * (number + 1), save_interval=1)
            kill_then_end(run.replace(decoder=recipe("decoder-tiny").decoder), draw, kills)
        run = run_with(tmp_path / folder, {}).replace(decoder=recipe("decoder-tiny").decoder)
        losses += spawn(loss_at_end, 1, run, 24)
    assert_losses_close(losses[1], losses[0])


def loss_at_end(run: RunConfig, steps: int) -> float:
    """Of the step behind the last one."""
    process_groups.join()
    live = start(run)
    assert CheckpointManager(run.checkpoint.save_to or "").load_latest(live.state) == steps
    return live.step(steps)
