"""Which run has a folder: newcomers tell the dead from the living by the kernel, by Slurm, or by watching."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from full_disk import largest_file

from megavlm.checkpoint import lock
from megavlm.checkpoint.lock import LOCK_FILE, FolderLock, Holder, LostFolderError, check_held, held
from megavlm.errors import CheckpointError, UnavailableError

HERE = Holder.this_process()
ELSEWHERE = dataclasses.replace(HERE, token="other", host="node7", kernel="another one", job="77", restarts="1")


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def left_by(folder: Path, content: bytes, seconds_ago: float = 0.0) -> Path:
    path = folder / LOCK_FILE
    path.write_bytes(content)
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def takes(newcomer: FolderLock, behind: float = 0.0) -> bool:
    """Whether a newcomer gets the folder when it has waited for so many seconds; then it gives it free again."""
    if newcomer._watched is not None:
        seen, _ = newcomer._watched
        newcomer._watched = seen, time.monotonic() - behind
    if not newcomer.take():
        return False
    assert (newcomer.folder / LOCK_FILE).read_bytes() == newcomer._content
    newcomer.release()
    assert list(newcomer.folder.iterdir()) == []
    return True


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_is_free_before_and_behind_a_run(tmp_path: Path) -> None:
    assert takes(FolderLock(tmp_path / "new" / "er"))
    assert takes(FolderLock(tmp_path / "new" / "er"))


def test_a_living_process_of_this_machine_is_left_alone(tmp_path: Path) -> None:
    path = left_by(tmp_path, dataclasses.replace(HERE, token="other", host="node3").to_bytes(), seconds_ago=1e6)
    newcomer = FolderLock(tmp_path)
    assert not takes(newcomer)
    with pytest.raises(CheckpointError) as caught:
        takes(newcomer, behind=lock.PATIENCE)
    assert str(caught.value) == (
        f"--save = '{tmp_path}': another run trains into it: process {os.getpid()} on node3, since {HERE.since}; "
        f"wait for it, end it, or give --save another folder; if it is surely dead, remove {path}"
    )
    newcomer.release()
    assert path.exists()


@pytest.mark.parametrize("case", ["ended", "its number given to another", "not reaped"])
def test_a_dead_process_of_this_machine_holds_nobody_up(case: str, tmp_path: Path) -> None:
    if case == "not reaped":
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        dead = dataclasses.replace(HERE, pid=process.pid, started=lock._state_and_start(process.pid)[1])
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    elif case == "ended":
        dead = dataclasses.replace(HERE, pid=ended_process())
    else:
        dead = dataclasses.replace(HERE, started=HERE.started - 1)
    left_by(tmp_path, dead.to_bytes())
    assert takes(FolderLock(tmp_path))
    if case == "not reaped":
        process.wait()


def test_a_process_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ending = dataclasses.replace(HERE, pid=process.pid, started=lock._state_and_start(process.pid)[1])
        left_by(tmp_path, ending.to_bytes())
        newcomer = FolderLock(tmp_path)
        assert not newcomer.take()
    assert newcomer.take()
    newcomer.release()


def test_a_job_that_slurm_started_again_goes_on_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by(tmp_path, ELSEWHERE.to_bytes())
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert takes(FolderLock(tmp_path))


@pytest.mark.parametrize(("job", "restarts"), [("77", "1"), ("78", "2")])
def test_a_second_start_within_a_job_looks_whether_the_first_lives(
    job: str, restarts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of another job does."""
    left_by(tmp_path, ELSEWHERE.to_bytes())
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert not takes(FolderLock(tmp_path))


@pytest.mark.parametrize(
    ("age", "needed"), [(0.0, lock.STALE_AFTER), (1e6, lock.WATCHED_FOR), (-1e6, lock.STALE_AFTER)]
)
@pytest.mark.parametrize("content", [ELSEWHERE.to_bytes(), b"", b"[1]", b'{"pid": 1}'])
def test_a_silent_run_of_another_machine_counts_as_dead(
    content: bytes, age: float, needed: float, tmp_path: Path
) -> None:
    """However old its file seems it is watched, and however young for no longer than it takes to be old."""
    left_by(tmp_path, content, seconds_ago=age)
    newcomer = FolderLock(tmp_path)
    assert not takes(newcomer)
    assert not takes(newcomer, behind=needed - 5)
    assert takes(newcomer, behind=needed)


@pytest.mark.parametrize("age", [0.0, 1e6])
def test_a_run_of_another_machine_lives_if_its_file_is_touched(age: float, tmp_path: Path) -> None:
    path = left_by(tmp_path, ELSEWHERE.to_bytes(), seconds_ago=age)
    newcomer = FolderLock(tmp_path)
    assert not newcomer.take()
    os.utime(path, (time.time() - age + 0.1,) * 2)  # by a clock that may be far off
    with pytest.raises(CheckpointError, match=r"process \d+ on node7, Slurm job 77, since .*; .*scancel 77"):
        newcomer.take()
    newcomer.release()
    assert path.exists()


def test_a_run_touches_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT", 0.1)
    mine = FolderLock(tmp_path)
    assert mine.take()
    path = left_by(tmp_path, mine._content, seconds_ago=1000)
    deadline = time.monotonic() + 30
    while time.time() - path.stat().st_mtime > 900 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert time.time() - path.stat().st_mtime < 900
    mine.release()
    assert not path.exists()


def test_of_two_newcomers_one_gets_the_folder(tmp_path: Path) -> None:
    """The slower of them found the dead run's file, and clears away what is the faster one's by then."""
    left_by(tmp_path, dataclasses.replace(HERE, pid=ended_process()).to_bytes())
    slower, faster = FolderLock(tmp_path), FolderLock(tmp_path)
    seen = lock._look(tmp_path / LOCK_FILE)
    assert seen is not None and faster.take()
    slower._clear_away(seen)
    assert not slower.take()
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    faster.check()
    faster.release()


def test_a_file_that_was_removed_is_made_again(tmp_path: Path) -> None:
    mine = FolderLock(tmp_path)
    assert mine.take()
    (tmp_path / LOCK_FILE).unlink()
    check_held(tmp_path)
    assert (tmp_path / LOCK_FILE).read_bytes() == mine._content
    mine.release()


def test_a_run_that_lost_its_folder_leaves_it_alone(tmp_path: Path) -> None:
    mine = FolderLock(tmp_path)
    assert mine.take()
    path = left_by(tmp_path, ELSEWHERE.to_bytes())
    with pytest.raises(LostFolderError, match=r"then came process \d+ on node7, Slurm job 77"):
        check_held(tmp_path)
    path.unlink()  # also when the other is done
    with pytest.raises(LostFolderError):
        check_held(tmp_path)
    path.write_bytes(ELSEWHERE.to_bytes())
    mine.release()
    assert path.read_bytes() == ELSEWHERE.to_bytes()
    check_held(tmp_path)


def test_a_run_that_slept_for_long_does_not_think_that_nobody_came(tmp_path: Path) -> None:
    mine = FolderLock(tmp_path)
    assert mine.take()
    (tmp_path / LOCK_FILE).unlink()
    mine._touched -= 2 * lock.STALE_AFTER
    with pytest.raises(LostFolderError):
        mine.check()
    mine.release()


@pytest.mark.usefixtures("alone")
def test_a_full_disk_and_a_forbidden_folder_are_said_in_a_line(tmp_path: Path) -> None:
    with (
        largest_file(0),
        pytest.raises(UnavailableError, match=f"{LOCK_FILE}': failed: File too large; check disk space"),
        held(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match="failed: Not a directory"), held(tmp_path / "file" / "save"):
        pass


@pytest.mark.usefixtures("alone")
def test_an_error_within_gives_the_folder_free(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), held(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
        raise KeyboardInterrupt
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("below", ["", "again", "a/b"])
def test_a_folder_within_a_checkpoint_is_refused(below: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "iter_0000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMMITTED").touch()
    (tmp_path / "link").symlink_to(checkpoint)
    for folder in (checkpoint / below, tmp_path / "link" / below):
        with pytest.raises(CheckpointError) as caught, held(folder):
            pass
        assert f"lies in the checkpoint {checkpoint}, which" in str(caught.value)
        assert str(caught.value).endswith(f"to go on there ({tmp_path / 'run'}), or another one")
    assert [path.name for path in checkpoint.iterdir()] == ["COMMITTED"]


def test_where_the_kernel_tells_little_a_process_goes_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS."""
    read_text = Path.read_text

    def refuse(path: Path, **options: Any) -> str:
        if path.is_relative_to("/proc"):
            raise FileNotFoundError(path)
        return read_text(path, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    mine = Holder.this_process()
    assert Holder.from_bytes(mine.to_bytes()) == mine and mine.kernel == mine.host
    assert mine.lives(mine) is True
    assert dataclasses.replace(mine, pid=2**31 - 2).lives(mine) is False
