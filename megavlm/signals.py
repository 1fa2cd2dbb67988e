"""Signals that ask a run to stop: they are noted, and the run ends behind the step that it is in.

Slurm sends SIGTERM, or SIGUSR1 where a script asks for it ahead of the time limit; a terminal sends SIGINT.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_noted: list[int] = []
_began: list[float] = []


def listen() -> None:
    """Note these signals from now on instead of dying of them; called first of all, for start-up may take minutes.

    The second SIGINT ends the process at once.
    """
    _noted.clear()
    _began[:] = [time.monotonic()]
    for number in ASKING:
        signal.signal(number, _note)


def noted() -> int:
    """The number of the first signal that came; 0 if none did."""
    return _noted[0] if _noted else 0


def seconds_running() -> float:
    """Since `listen`, or since the first call of this where nobody listens."""
    if not _began:
        _began.append(time.monotonic())
    return time.monotonic() - _began[0]


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(number)
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if len(_noted) == 1 and os.environ.get("RANK", "0") == "0":
        # Not the log: its handlers may be in the middle of a line.
        os.write(2, f"megavlm: {signal.Signals(number).name}: the run ends behind this step, and saves\n".encode())
