"""On a terminal, a line below the log with rate and time left; in files nothing of it ever stands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TextIO

from megavlm.data.progress import Progress
from megavlm.log import get_logger
from megavlm.train.callbacks.base import Callback
from megavlm.train.report import RunStart, StepReport


class ProgressBar(Callback):
    """Drawn by the rank that prints the training lines. Log lines take its place, and it comes back below them."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._progress: Progress | None = None
        self._hooks: list[logging.Handler] = []

    def start(self, start: RunStart) -> None:
        log = start.run.log
        if not (log.progress_bar and start.groups.speaks and self._stream.isatty()):
            return
        self._progress = Progress("training", start.run.train.train_iters, "steps", self._stream)
        self._progress.update(start.first_iteration - 1)
        self._hooks = [_Hook(self._progress.clear), _Hook(self._progress.redraw)]
        before, behind = self._hooks
        handlers = get_logger("megavlm").handlers
        handlers[:] = [before, *handlers, behind]

    def after_step(self, report: StepReport) -> None:
        if self._progress is not None:
            self._progress.update(report.iteration)

    def end(self, iteration: int) -> None:
        for hook in self._hooks:
            get_logger("megavlm").removeHandler(hook)
        if self._progress is not None:
            self._progress.finish(iteration)


class _Hook(logging.Handler):
    """Does something in its turn among a logger's handlers."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__()
        self._action = action

    def emit(self, record: logging.LogRecord) -> None:
        self._action()
