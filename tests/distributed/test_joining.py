"""Processes that do not meet: one line that says where, instead of torch's traceback."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megavlm.cli import main
from megavlm.errors import UnavailableError
from megavlm.parallel import groups as process_groups
from megavlm.parallel.timeout import timeout_ahead
from megavlm.platform import machine
from megavlm.recipes import RECIPES, recipe
from megavlm.testing import spawn

CASES: list[tuple[dict[str, str | None], str]] = [
    ({"RANK": "1"}, "timed out"),  # where nobody listens
    ({"RANK": "1", "MASTER_ADDR": "no.such.host.invalid"}, "timed out"),
    ({"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": None}, "1/3 clients joined"),  # the others do not come
    ({"RANK": "0", "MASTER_PORT": None}, "MASTER_PORT expected, but not set"),
]


def join_alone(settings: list[dict[str, str | None]]) -> list[str]:
    return [_refusal(one) for one in settings]


def _refusal(settings: dict[str, str | None]) -> str:
    for name, value in settings.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    with pytest.raises(UnavailableError) as caught:
        process_groups.join(timeout_minutes=0.05)
    return str(caught.value)


def test_who_meets_nobody_says_where_it_waited() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    usual = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings = [{**usual, **changes} for changes, _ in CASES]
    (lines,) = spawn(join_alone, 1, settings)
    for one, (_, said), line in zip(settings, CASES, lines, strict=True):
        place = re.escape(f"{one['MASTER_ADDR']}:{one['MASTER_PORT']}")
        others = f"rank {one['RANK']} did not meet 2 others"
        assert re.match(f"MASTER_ADDR:MASTER_PORT = '{place}': is where {others} .*{said}.*; give", line), line


def meet_with_gpus(gpus: int, local_rank: str) -> None:
    os.environ["LOCAL_RANK"] = local_rank
    with (
        mock.patch.object(machine, "prepare", return_value=torch.device("cuda", 0)),
        mock.patch("torch.cuda.device_count", return_value=gpus),
        pytest.raises(UnavailableError, match=rf"LOCAL_RANK = {local_rank}.*torch sees {gpus} here; start {gpus} proc"),
    ):
        process_groups.join()


def test_a_process_without_a_gpu_of_its_own_is_refused() -> None:
    spawn(meet_with_gpus, 1, 1, "1")


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE"])
def test_a_launcher_that_counts_in_words_is_refused(variable: str) -> None:
    command = [sys.executable, "-m", "megavlm", "train", "decoder-tiny"]
    done = subprocess.run(command, env={**os.environ, variable: "x"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"megavlm: error: {variable} = 'x': is no whole number; start with torchrun" in done.stderr


FAILS_ALONE = """
import sys, time
from unittest import mock
import torch.distributed as dist
from megavlm import cli, commands
from megavlm.errors import DataError
from megavlm.platform import machine

def fail(arguments):
    with commands._joined(arguments):
        mock.patch.object(machine, "backend", return_value="nccl").start()
        raise {error}

mock.patch.object(dist, "get_world_size", return_value=2).start()
mock.patch.object(dist, "destroy_process_group", side_effect=lambda: time.sleep(3600)).start()
mock.patch.object(commands, "train", fail).start()
sys.exit(cli.main(["train"]))
"""
"""One of two ranks on GPUs, where leaving waits for the other."""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("RuntimeError('out of memory')", 1, "RuntimeError: out of memory"),
        ("DataError('row', 3, 'is broken', 'mend it')", 2, "megavlm: error: row = 3: is broken; mend it"),
        ("KeyboardInterrupt", 1, ""),
    ],
)
def test_who_fails_alone_on_gpus_says_so_and_waits_for_nobody(error: str, code: int, said: str) -> None:
    program = FAILS_ALONE.format(error=error)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert said in [*done.stderr.splitlines()[-1:], ""]


def minutes_in_training(options: list[str]) -> tuple[int, set[float]]:
    """The exit code of a step of training, and how long its process groups wait."""
    found: set[float] = set()

    def telling(function: Any) -> Any:
        def tells(*arguments: Any, **named: Any) -> Any:
            found.add(named["timeout"].total_seconds() / 60)
            return function(*arguments, **named)

        return tells

    dist.init_process_group, dist.new_group = telling(dist.init_process_group), telling(dist.new_group)
    return main(["train", "decoder-tiny", "--train-iters", "1", *options]), found


@pytest.mark.parametrize(("options", "minutes"), [([], 10), (["--distributed-timeout-minutes", "7.5"], 7.5)])
def test_the_command_line_says_how_long_processes_wait(options: list[str], minutes: float) -> None:
    assert spawn(minutes_in_training, 2, options) == [(0, {minutes})] * 2


def train_without_the_others(options: list[str]) -> int:
    os.environ.update({"WORLD_SIZE": "2", "RANK": "0"})
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    return main(["train", "decoder-tiny", *options])


def test_who_is_told_to_wait_for_seconds_does() -> None:
    assert spawn(train_without_the_others, 1, ["parallel.distributed_timeout_minutes=0.02"], timeout=60) == [2]


OPTION = "--distributed-timeout-minutes"


@pytest.mark.parametrize(
    ("words", "minutes"),
    [
        (["--lr", "1", OPTION, "20"], 20),
        ([f"{OPTION}=20", OPTION, "15"], 15),
        (["parallel.distributed_timeout_minutes=0.5"], 0.5),
        ([OPTION, "20", f"finetune:{OPTION}=60", f"pretrain:{OPTION}", "5"], 60),
        ([], 10),
        ([OPTION], 10),
        ([OPTION, "0"], 10),
        ([OPTION, "many"], 10),
    ],
)
def test_the_time_is_known_before_the_rest_is_read(words: list[str], minutes: float) -> None:
    assert timeout_ahead(words) == minutes


@pytest.mark.parametrize("text", ["0", "-1", "1e300", "nan", "soon"])
def test_no_time_to_wait_is_refused_in_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "decoder-tiny", OPTION, text]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"megavlm: error: {OPTION} = ") and said.count("\n") == 1, said


def test_recipes_leave_the_time_to_the_command_line() -> None:
    """It is needed before a recipe is looked at."""
    assert {recipe(name).parallel.distributed_timeout_minutes for name in RECIPES} == {10.0}
