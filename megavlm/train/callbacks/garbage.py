"""Python's garbage collection under the run's control: all ranks pause for it behind the same step."""

from __future__ import annotations

import gc

from megavlm.build.run_config import RunConfig
from megavlm.train.callbacks.base import Callback
from megavlm.train.report import RunStart, StepReport


class GarbageCollection(Callback):
    """Otherwise each rank collects at a moment of its own, and the others wait for it in their next collective."""

    def __init__(self, run: RunConfig) -> None:
        self._interval = run.log.manual_gc_interval
        self._was_on = False

    def start(self, start: RunStart) -> None:
        self._was_on = gc.isenabled()
        gc.disable()
        gc.collect()

    def after_step(self, report: StepReport) -> None:
        if self._interval and report.iteration % self._interval == 0:
            gc.collect()

    def end(self, iteration: int) -> None:
        if self._was_on:
            gc.enable()
