"""A run that is asked to stop, at any moment and on any rank: nothing is lost, and the same command goes on."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from text_runs import assert_same_end, prepare_text, text_options

from megavlm import signals
from megavlm.checkpoint import manager
from megavlm.checkpoint.atomic import staging_path
from megavlm.checkpoint.lock import LOCK_FILE
from megavlm.checkpoint.shelf import checkpoint_path, steps_saved
from megavlm.cli import main
from megavlm.testing import spawn
from megavlm.train import evaluation, loop
from megavlm.train.callbacks.base import Callback
from megavlm.train.stopping import EX_TEMPFAIL

STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_text(tmp_path_factory.mktemp("world"))


def command(world: Path, save: Path, *more: str) -> list[str]:
    """With evaluations behind step 4 and at the end."""
    held_out = ["--valid-data-path", str(world / "data"), "--eval-interval", "4", "--eval-iters", "2"]
    log = ["--log-json", str(save.with_suffix(".jsonl"))]
    return ["train", "decoder-tiny", *text_options(world, save, STEPS), *held_out, *log, *more]


def evaluated(save: Path) -> dict[int, float]:
    lines = map(json.loads, save.with_suffix(".jsonl").read_text().splitlines())
    found = [(line["iteration"], line["losses"]["lm loss"]) for line in lines if line["kind"] == "evaluation"]
    assert len(dict(found)) == len(found), "once each"
    return dict(found)


def run_command(arguments: list[str], moment: str = "", number: int = 0, times: int = 1) -> int:
    """The exit code; the last rank gets a signal at the moment, or finds that an hour has gone by."""
    if moment and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        send_at(moment, number, times)
    with contextlib.redirect_stdout(io.StringIO()):
        return main(arguments)


def send_at(moment: str, number: int, times: int) -> None:
    def sending(function: Any) -> Any:
        def sends_first(*arguments: Any, **named: Any) -> Any:
            for _ in range(times):
                signal.raise_signal(number)
            return function(*arguments, **named)

        return sends_first

    class AtStep(Callback):
        def before_step(self, iteration: int) -> None:
            if iteration == 3 and moment == "clock":
                signals._began[0] -= 3600
            elif iteration == 3:
                sending(lambda: None)()

    if moment == "start-up":
        loop.build_training = sending(loop.build_training)
    elif moment == "save":
        manager.write_shards = sending(manager.write_shards)
    elif moment == "evaluation":
        evaluation.forward_loss = sending(evaluation.forward_loss)
    else:
        usual = loop.build_callbacks
        loop.build_callbacks = lambda run, groups: [*usual(run, groups), AtStep()]


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that nobody stopped."""
    save = tmp_path_factory.mktemp("whole") / "save"
    assert spawn(run_command, 2, command(world, save), timeout=300) == [0, 0]
    return save


@pytest.mark.parametrize(
    ("moment", "number", "more", "saved"),
    [
        ("start-up", signal.SIGTERM, (), []),
        ("step", signal.SIGUSR1, (), [2, 3]),
        ("save", signal.SIGTERM, (), [2, 3]),
        ("save", signal.SIGTERM, ("--async-save",), [2, 3]),
        ("evaluation", signal.SIGINT, (), [2, 4]),
        ("evaluation", signal.SIGINT, ("--eval-interval", "6"), [2, 4, 6]),
        ("", 0, ("--exit-interval", "3"), [2, 3]),
        ("", 0, ("--exit-interval", "4"), [2, 4]),
        ("", 0, ("--exit-duration-in-mins", "1e-6"), []),
        ("clock", 0, ("--exit-duration-in-mins", "60"), [2, 3]),
    ],
    ids=[
        *("start-up", "step", "save", "save in the background", "evaluation", "last evaluation"),
        *("interval", "interval of evaluations", "no time", "time"),
    ],
)
def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    moment: str, number: int, more: tuple[str, ...], saved: list[int], world: Path, whole: Path, tmp_path: Path
) -> None:
    save = tmp_path / "save"
    codes = spawn(run_command, 2, command(world, save, *more), moment, number, timeout=300)
    assert codes == [EX_TEMPFAIL, EX_TEMPFAIL]
    assert steps_saved(save) == saved
    assert not (save / LOCK_FILE).exists()
    assert spawn(run_command, 2, command(world, save), timeout=300) == [0, 0]
    assert_same_end(whole, save, STEPS)
    expected = evaluated(whole)
    # One that ended its last step goes on with what its settings are now: no step, and the evaluation at the end.
    assert evaluated(save) == ({STEPS: expected[STEPS]} if saved[-1:] == [STEPS] else expected)


def test_the_second_interrupt_ends_at_once(world: Path, tmp_path: Path) -> None:
    codes = spawn(run_command, 1, command(world, tmp_path / "save"), "step", signal.SIGINT, 2, timeout=300)
    assert codes == [130]
    assert steps_saved(tmp_path / "save") == [2]
    assert not (tmp_path / "save" / LOCK_FILE).exists()


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.full)])
def test_torchrun_waits_for_a_slow_save(seconds: int, world: Path, whole: Path, tmp_path: Path) -> None:
    """The scheduler's signal comes to torchrun alone, in the middle of a save."""
    save, script = tmp_path / "save", Path(__file__).parents[1] / "support" / "slow_save.py"
    torchrun = [sys.executable, "-m", "megavlm.torchrun", "--nproc-per-node", "2", "--shutdown-timeout", "600"]
    torchrun += ["--signals-to-handle", "SIGTERM,SIGUSR1,SIGINT", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", "localhost:0", str(script), str(seconds)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*torchrun, *command(world, save)], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            staging = staging_path(checkpoint_path(save, 2))
            deadline = time.monotonic() + 300
            while not staging.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(300 + 3 * seconds) == EX_TEMPFAIL
        finally:
            process.kill()
    text = (tmp_path / "log").read_text()
    assert "megavlm: SIGUSR1: the run can go on from where it was" in text, text
    assert steps_saved(save) == [2, 3], text
    assert "SIGUSR1: the run ends behind this step" in text and "stopped behind step 3 of 6: SIGUSR1" in text
    assert spawn(run_command, 2, command(world, save), timeout=300) == [0, 0]
    assert_same_end(whole, save, STEPS)
