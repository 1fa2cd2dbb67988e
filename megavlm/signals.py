"""Signals that ask a run to stop: they are noted, and the run ends behind the step that it is in.

Slurm sends SIGTERM, or SIGUSR1 where a script asks for it ahead of the time limit; a terminal sends SIGINT. Whether it
was heeded a launcher learns from a file of each process: torchrun tells it no exit codes then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ENDINGS = "MEGAVLM_ENDINGS"
"""The variable by which a launcher names the folder for those files."""
_UNDER_WAY = "under way"

_noted: list[int] = []
_began: list[float] = []


def listen() -> None:
    """Note these signals from now on instead of dying of them; called first of all, for start-up may take minutes.

    The second SIGINT ends the process at once.
    """
    _noted.clear()
    _began[:] = [time.monotonic()]
    _tell(_UNDER_WAY)
    for number in ASKING:
        signal.signal(number, _note)


def noted() -> int:
    """The number of the first signal that came; 0 if none did."""
    return _noted[0] if _noted else 0


def ended(exit_code: int) -> int:
    """Tell the launcher that the run came to an end of its own choice; return the code."""
    _tell(str(exit_code))
    return exit_code


def endings(folder: Path) -> list[int | None]:
    """The exit codes that this node's processes chose; None for one that began and never came to choose."""
    said = [file.read_text() for file in sorted(folder.iterdir())]
    return [int(word) if word.isdecimal() else None for word in said]


def seconds_running() -> float:
    """Since `listen`, or since the first call of this where nobody listens."""
    if not _began:
        _began.append(time.monotonic())
    return time.monotonic() - _began[0]


def _tell(word: str) -> None:
    folder = os.environ.get(ENDINGS)
    if folder is not None:
        with contextlib.suppress(OSError):  # the launcher may be gone, and its folder
            (Path(folder) / os.environ.get("LOCAL_RANK", "0")).write_text(word)


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(number)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if len(_noted) == 1 and os.environ.get("RANK", "0") == "0":
        # Not the log: its handlers may be in the middle of a line.
        os.write(2, f"megavlm: {signal.Signals(number).name}: the run ends behind this step, and saves\n".encode())
