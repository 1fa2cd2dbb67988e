"""How far a long job is: one line that renews itself on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

ON_TERMINAL, ELSEWHERE = 0.2, 15.0
"""Seconds between two lines."""
WARM_UP = 1.0
"""Seconds in which what is done counts as done before: a job that is gone on with starts with much of it."""


class Progress:
    """The line of one job: what is done of how much, how fast, and the time left."""

    def __init__(self, job: str, total: int, unit: str, stream: TextIO | None = None) -> None:
        self._job, self._total, self._unit = job, total, unit
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._period = ON_TERMINAL if self._is_terminal else ELSEWHERE
        self._made = self._start = self._last = time.monotonic()
        self._before = self._done = 0

    def update(self, done: int) -> None:
        """Say how much is done, unless that was said a moment ago."""
        now, self._done = time.monotonic(), done
        if now - self._made < WARM_UP:
            self._start, self._before = now, done
        if now - self._last >= self._period:
            self._last = now
            self._write(done, now)

    def finish(self, done: int) -> None:
        """The last line."""
        self._write(done, time.monotonic())
        if self._is_terminal:
            print(file=self._stream, flush=True)

    def clear(self) -> None:
        """Take the line off a terminal, for other output to stand in its place; the next update brings it back."""
        if self._is_terminal:
            print("\r\033[K", end="", file=self._stream, flush=True)
            self._last = 0.0

    def redraw(self) -> None:
        """Put the line back on a terminal, behind what took its place."""
        if self._is_terminal:
            self._write(self._done, time.monotonic())

    def _write(self, done: int, now: float) -> None:
        text = line(self._job, done, self._total, self._unit, done - self._before, now - self._start)
        start, end = ("\r\033[K", "") if self._is_terminal else ("", "\n")
        print(start + text, file=self._stream, flush=True, end=end)


def line(job: str, done: int, total: int, unit: str, done_now: int, seconds: float) -> str:
    """What the line says, without a total where that is 0.

    `done_now` is this run's own part of what is done, by which the rate is measured.
    """
    text = f"{job}: {done:,} of {total:,} {unit} ({100 * done / total:.0f} %)" if total else f"{job}: {done:,} {unit}"
    if done_now > 0 and seconds > 0:
        rate = done_now / seconds
        text += f", {rate:,.0f} {unit}/s" if rate >= 10 else f", {rate:.2g} {unit}/s"
        if done < total:
            text += f", {clock((total - done) / rate)} left"
    return text


def clock(seconds: float) -> str:
    """A length of time, as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
