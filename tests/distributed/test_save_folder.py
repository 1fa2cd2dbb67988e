"""Two runs into one folder: the second is refused, and the first ends as if it had been alone."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from text_runs import assert_same_end, prepare_text, text_options

from megavlm.checkpoint.lock import LOCK_FILE, Holder
from megavlm.checkpoint.shelf import steps_saved
from megavlm.cli import main
from megavlm.curriculum.run import train_stages
from megavlm.curriculum.stages import Stage
from megavlm.errors import CheckpointError
from megavlm.parallel import groups as process_groups
from megavlm.recipes import recipe
from megavlm.testing import spawn
from megavlm.train import loop
from megavlm.train.callbacks.base import Callback

STEPS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_text(tmp_path_factory.mktemp("world"))


def command(world: Path, save: Path) -> list[str]:
    return ["train", "decoder-tiny", *text_options(world, save, STEPS)]


def train(arguments: list[str], before_step_4: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """The exit code, and what was said as an error."""

    class AtStep(Callback):
        def before_step(self, iteration: int) -> None:
            if iteration == 4 and os.environ["RANK"] == "0":
                before_step_4()

    usual = loop.build_callbacks
    loop.build_callbacks = lambda run, groups: [*usual(run, groups), AtStep()]
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        return main(arguments), said.getvalue()


def train_twice(arguments: list[str]) -> tuple[int, list[tuple[int, str]]]:
    """The exit code of a run, and the end of another one that is started by the same command meanwhile."""
    others = []

    def start_again() -> None:
        ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        torchrun = ["-m", "megavlm.torchrun", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
        again = [sys.executable, "-P", *torchrun, "--rdzv-endpoint", "localhost:0", "-m", "megavlm", *arguments]
        done = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=300, check=False)
        others.append((done.returncode, done.stderr))

    return train(arguments, start_again)[0], others


def test_the_second_of_two_runs_is_refused_and_the_first_does_not_notice(world: Path, tmp_path: Path) -> None:
    alone, save = tmp_path / "alone", tmp_path / "save"
    assert spawn(train, 2, command(world, alone), timeout=300) == [(0, "")] * 2
    (code, ((other, said),)), (code_1, none) = spawn(train_twice, 2, command(world, save), timeout=600)
    assert (code, code_1, none, other) == (0, 0, [], 2), said
    errors = [line for line in said.splitlines() if "error: --save" in line]
    assert len(errors) == 1 and f"'{save}': another run trains into it: process " in errors[0], said
    assert "Traceback" not in said
    assert_same_end(alone, save, STEPS)
    assert sorted(path.name for path in save.iterdir()) == sorted(path.name for path in alone.iterdir())


def train_and_lose(arguments: list[str], content: bytes) -> tuple[int, str]:
    path = Path(arguments[arguments.index("--save") + 1]) / LOCK_FILE

    def lose() -> None:
        path.write_bytes(content)

    return train(arguments, lose)


def test_a_run_that_loses_its_folder_ends_without_saving_there(world: Path, tmp_path: Path) -> None:
    content = dataclasses.replace(Holder.this_process(), host="node7", kernel="another").to_bytes()
    first, second = spawn(train_and_lose, 2, command(world, tmp_path), content, timeout=300)
    assert (first[0], second) == (2, (2, ""))
    errors = [line for line in first[1].splitlines() if "error: --save" in line]
    assert len(errors) == 1 and "is no longer this run's" in errors[0] and "on node7" in errors[0], first[1]
    assert steps_saved(tmp_path) == [2]
    assert (tmp_path / LOCK_FILE).read_bytes() == content


def train_within(root: Path, holder: bytes) -> str:
    run = recipe("decoder-tiny")
    run = run.replace(checkpoint=run.checkpoint.replace(save_to=str(root / "one")))
    process_groups.join()
    with pytest.raises(CheckpointError) as caught:
        train_stages([Stage("one", run, 0, "random weights", None)])
    assert (root / LOCK_FILE).read_bytes() == holder
    return str(caught.value)


def test_the_folder_of_all_stages_is_held_as_well(tmp_path: Path) -> None:
    """Between two stages, too, nobody else may begin the next one."""
    holder = Holder.this_process().to_bytes()
    (tmp_path / LOCK_FILE).write_bytes(holder)
    (said,) = spawn(train_within, 1, tmp_path, holder)
    assert f"'{tmp_path}': another run trains into it: process {os.getpid()} on " in said
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("below", ["", "again"])
def test_a_run_into_a_checkpoint_is_refused(below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = ["train", "decoder-tiny", "--train-iters", "1", "--save"]
    assert main([*toy, str(tmp_path)]) == 0
    checkpoint = tmp_path / "iter_0000001"
    files = sorted(checkpoint.rglob("*"))
    capsys.readouterr()
    assert main([*toy, str(checkpoint / below)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"lies in the checkpoint {checkpoint}, which" in said, said
    assert sorted(checkpoint.rglob("*")) == files
