"""Processes that benchmarks start, commands as a user types them or functions in a fresh one, and their memory."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from tempfile import TemporaryFile
from time import perf_counter
from types import TracebackType

import torch

from megavlm.bench.harness import THREADS, NoRowError

_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAST_WORDS = 2000
_KIB = 1024


@dataclass(frozen=True)
class Done:
    """A command that has succeeded."""

    lines: list[tuple[float, str]]
    """What it said on standard output, each line with the seconds since its start."""
    seconds: float
    peak: int
    """Bytes of memory that it held at most."""

    def reached(self, text: str) -> tuple[float, str]:
        """When it first said this, and the line."""
        for seconds, line in self.lines:
            if text in line:
                return seconds, line
        raise NoRowError(
            f"a command did not say {text!r}, but: {''.join(line for _, line in self.lines)[-_LAST_WORDS:]}"
        )


def megavlm_command(*arguments: str) -> list[str]:
    """The console script's, of this interpreter."""
    return [sys.executable, "-m", "megavlm", *arguments]


def environment() -> dict[str, str]:
    """Ours, without what torchrun tells its ranks, and with the threads of all benchmarks."""
    kept = {name: value for name, value in os.environ.items() if not _is_of_ranks(name)}
    return {**kept, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(THREADS)}


def be_alone() -> None:
    """Forget what torchrun told this process: it is one by itself, whoever started it."""
    for name in [name for name in os.environ if _is_of_ranks(name)]:
        del os.environ[name]


def _is_of_ranks(name: str) -> bool:
    return name in _OF_RANKS or name.startswith("TORCHELASTIC_")


def fresh() -> ForkServerContext | SpawnContext:
    """Starts processes that share nothing with this one.

    On a CPU they are forked from one that has imported what they need. What has asked for CUDA cannot be forked, and
    whether an import does is nobody's promise: with a GPU each begins anew.
    """
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "megavlm.bench.real_aquila_vl", "megavlm.bench.real_infimm"])
    return context


def watched(command: list[str]) -> Done:
    """Run a command to its end; NoRowError with its last words where it fails."""
    began = perf_counter()
    with (
        TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        Memory("VmHWM", process.pid) as memory,
    ):
        assert process.stdout is not None
        lines = [(perf_counter() - began, line) for line in process.stdout]
        process.wait()
        seconds = perf_counter() - began
        if process.returncode:
            errors.seek(0)
            said = ("".join(line for _, line in lines) + errors.read()).strip()[-_LAST_WORDS:]
            raise NoRowError(f"{' '.join(command)} ended with exit code {process.returncode}: {said}")
    return Done(lines, seconds, memory.highest)


class Memory:
    """A process's memory, read again and again while this is open.

    Not asked of `wait4`, whose peak begins with that of the process that started the other one.
    """

    def __init__(self, field: str, pid: int | str = "self", every: float = 0.01) -> None:
        """`field` of /proc/PID/status: VmHWM, the most that it ever held; RssAnon, without mapped files; ..."""
        self._field, self._path, self._every = field, Path(f"/proc/{pid}/status"), every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self.first = self.highest = 0
        """Bytes."""

    def __enter__(self) -> Memory:
        self.first = self.highest = self._read()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ended.wait(self._every):
            self.highest = max(self.highest, self._read())

    def _read(self) -> int:
        """0 where the process has ended."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except OSError:
            return 0
        _, found, rest = text.partition(f"{self._field}:")
        return int(rest.split(maxsplit=1)[0]) * _KIB if found else 0


def trim_memory() -> None:
    """Hand back what malloc keeps of freed memory, which would be filled before the process grows."""
    ctypes.CDLL(None).malloc_trim(0)


def available_memory() -> int:
    """Bytes that a process could still take."""
    text = Path("/proc/meminfo").read_text(encoding="utf-8")
    return int(text.partition("MemAvailable:")[2].split(maxsplit=1)[0]) * _KIB
