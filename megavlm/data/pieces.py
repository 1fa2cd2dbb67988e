"""Long work cut into pieces: done by any number of processes, each result kept on disk, continued where it stopped.

Whatever the number of processes, and however often the work was killed, the pieces are the same.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.data.files import PARTIAL, atomic_file
from megavlm.errors import ConfigError, UnavailableError

OnProgress = Callable[[int, int], None]
"""(bytes done, samples done), of the whole work."""
PLAN_FILE = "plan.json"
_PERIOD = 0.5
"""Seconds between two reports of progress."""


@dataclass(frozen=True)
class Piece:
    """The result of one task."""

    facts: dict[str, Any]
    """What JSON can hold."""
    columns: dict[str, Any]
    """Arrays."""


Task = Callable[[OnProgress], Piece]
"""Does a part of the work and reports its own progress; picklable where there are worker processes."""


def make_pieces(
    folder: Path,
    plan: Mapping[str, Any],
    tasks: Sequence[Task],
    workers: int = 0,
    on_progress: OnProgress | None = None,
) -> list[Path]:
    """Do the tasks whose pieces are not in the folder yet, in `workers` processes or, with 0, in this one.

    `plan` is what the pieces depend on: work that was begun by another plan is refused.
    """
    _open(folder, plan)
    paths = [folder / f"{number:06d}.npz" for number in range(len(tasks))]
    missing = [(path, task) for path, task in zip(paths, tasks, strict=True) if not path.exists()]
    progress = _Progress(on_progress)
    for path in paths:
        if on_progress is not None and path.exists():
            progress.add(*read_facts(path)["done"])
    if workers == 0:
        for path, task in missing:
            _make(path, task, progress.add)
    elif missing:
        _make_in_pool(missing, min(workers, len(missing)), progress)
    return paths


def read_piece(path: Path) -> Piece:
    """A piece from its file."""
    with np.load(path, allow_pickle=False) as arrays:
        columns = {name: arrays[name] for name in arrays.files}
    return Piece(json.loads(columns.pop("facts").tobytes()), columns)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a piece from its file, its columns unread."""
    with np.load(path, allow_pickle=False) as arrays:
        facts: dict[str, Any] = json.loads(arrays["facts"].tobytes())
    return facts


def pieces_of(paths: Sequence[Path]) -> Iterator[Piece]:
    """The pieces in their order, one at a time in memory."""
    for path in paths:
        yield read_piece(path)


class _Progress:
    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress
        self._bytes = self._samples = 0

    def add(self, new_bytes: int, new_samples: int) -> None:
        self._bytes, self._samples = self._bytes + new_bytes, self._samples + new_samples
        if self._on_progress is not None:
            self._on_progress(self._bytes, self._samples)


def _open(folder: Path, plan: Mapping[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
        raise ConfigError("output folder", str(folder.parent), problem, "give one that you may write to") from None
    for leftover in folder.glob(f".*{PARTIAL}"):
        leftover.unlink()
    text = json.dumps(plan, sort_keys=True, indent=1)
    path = folder / PLAN_FILE
    if not path.exists():
        with atomic_file(path) as file:
            file.write(text.encode())
    elif path.read_text() != text:
        problem = "holds work that was begun with other settings or other sources"
        raise ConfigError("unfinished work", str(folder), problem, "go on with the former ones, or remove this folder")


def _make(path: Path, task: Task, add: OnProgress) -> None:
    done = [0, 0]

    def count(new_bytes: int, new_samples: int) -> None:
        done[0], done[1] = done[0] + new_bytes, done[1] + new_samples
        add(new_bytes, new_samples)

    piece = task(count)
    facts = np.frombuffer(json.dumps({**piece.facts, "done": done}).encode(), dtype=np.uint8)
    with atomic_file(path) as file:
        np.savez(file, facts=facts, **piece.columns)


_counter: Any = None
"""In a worker process: bytes and samples done, shared with all others."""


def _adopt(counter: Any) -> None:
    global _counter
    _counter = counter


def _add_shared(new_bytes: int, new_samples: int) -> None:
    with _counter.get_lock():
        _counter[0] += new_bytes
        _counter[1] += new_samples


def _make_in_worker(path: Path, task: Task) -> None:
    _make(path, task, _add_shared)


def _make_in_pool(missing: Sequence[tuple[Path, Task]], workers: int, progress: _Progress) -> None:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    counter = context.Array("Q", 2)
    reported = [0, 0]
    with ProcessPoolExecutor(workers, context, initializer=_adopt, initargs=(counter,)) as pool:
        pending = {pool.submit(_make_in_worker, path, task) for path, task in missing}
        try:
            while pending:
                done, pending = wait(pending, timeout=_PERIOD, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                now = counter[:]
                progress.add(now[0] - reported[0], now[1] - reported[1])
                reported = now
        except BrokenProcessPool:
            raise UnavailableError(
                "worker processes", workers, "one was killed, perhaps for memory", "run again; it goes on from here"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
