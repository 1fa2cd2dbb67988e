"""The spawn helper: results by rank, the first failure's own words, a hard end, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megavlm.errors import ConfigError
from megavlm.parallel import groups as process_groups
from megavlm.parallel.agree import agreed
from megavlm.testing import RankFailed, spawn


def sum_of_ranks(extra: torch.Tensor) -> torch.Tensor:
    process_groups.join()
    total = torch.tensor(float(os.environ["RANK"]))
    torch.distributed.all_reduce(total)
    return total + extra


def fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("a number that is wrong")
    time.sleep(60)


def wait_with_a_child(pid_file: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pid_file.with_suffix(f".{os.environ['RANK']}").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)


def die_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)
    time.sleep(60)


def mistake_on_rank_one() -> tuple[str, int | None]:
    process_groups.join()
    with pytest.raises(ConfigError) as caught, agreed():
        if os.environ["RANK"] == "1":
            raise ConfigError("the setting", 3, "is wrong", "use 4")
    return str(caught.value), caught.value.printed_by_rank


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return state != "Z"


def test_results_come_by_rank() -> None:
    results = spawn(sum_of_ranks, 3, torch.tensor(0.5))
    assert [float(result) for result in results] == [3.5, 3.5, 3.5]


def test_the_first_failure_ends_all_with_its_own_words() -> None:
    began = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 failed:(.|\n)*a number that is wrong") as caught:
        spawn(fail_on_rank_one, 2)
    assert isinstance(caught.value.error, ValueError)
    assert time.monotonic() - began < 30


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankFailed, match="rank 1 died with exit code 7"):
        spawn(die_on_rank_one, 2)


def die_unseen_on_rank_one() -> None:
    """A child keeps the pipe open, so that nothing tells of the death before the other rank fails for want of it."""
    if os.environ["RANK"] == "1":
        if os.fork() == 0:
            time.sleep(60)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    raise ConnectionError("closed by peer")


def test_a_rank_that_dies_is_named_before_one_that_fails_for_want_of_it() -> None:
    with pytest.raises(RankFailed, match="rank 1 died with exit code -9"):
        spawn(die_unseen_on_rank_one, 2)


def test_time_is_up_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"rank 0 was not done after 3 s \(still running: \[0, 1\]\)"):
        spawn(wait_with_a_child, 2, tmp_path / "pids", timeout=3.0)
    pids = [int(pid) for file in tmp_path.iterdir() for pid in file.read_text().split()]
    assert len(pids) == 4
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def test_a_mistake_that_one_rank_sees_is_everyones() -> None:
    assert spawn(mistake_on_rank_one, 2) == [("the setting = 3: is wrong; use 4", 1)] * 2
