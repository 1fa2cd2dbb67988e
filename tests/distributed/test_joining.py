"""Processes that do not meet: one line that says where, instead of torch's traceback."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from unittest import mock

import pytest
import torch

from megavlm.errors import UnavailableError
from megavlm.parallel import groups as process_groups
from megavlm.platform import machine
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
    with commands._joined():
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
