"""Several callbacks as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megavlm.train.callbacks.base import Callback
from megavlm.train.report import RunStart, StepReport


class Chain(Callback):
    """Calls one after another."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = callbacks

    def start(self, start: RunStart) -> None:
        for one in self.callbacks:
            one.start(start)

    def before_step(self, iteration: int) -> None:
        for one in self.callbacks:
            one.before_step(iteration)

    def after_step(self, report: StepReport) -> None:
        for one in self.callbacks:
            one.after_step(report)

    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None:
        for one in self.callbacks:
            one.evaluated(iteration, losses)

    def saved(self, iteration: int, blocked_ms: float) -> None:
        for one in self.callbacks:
            one.saved(iteration, blocked_ms)

    def end(self, iteration: int) -> None:
        for one in self.callbacks:
            one.end(iteration)
