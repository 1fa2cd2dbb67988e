"""What can be hooked into the training loop."""

from __future__ import annotations

from collections.abc import Mapping

from megavlm.train.report import RunStart, StepReport


class Callback:
    """Called on every rank, all callbacks in one order; each overrides what it needs. A collective is for all ranks."""

    def start(self, start: RunStart) -> None:
        """Before the first step."""

    def before_step(self, iteration: int) -> None:
        """With the step's data at hand."""

    def after_step(self, report: StepReport) -> None:
        """Behind the update of the weights."""

    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None:
        """Behind an evaluation on held-out data; losses as in `StepReport`."""

    def saved(self, iteration: int, blocked_ms: float) -> None:
        """Behind a save, or the start of one in the background; for so long training stood still."""

    def end(self, iteration: int) -> None:
        """Behind the last step, whether the run is complete, was stopped, or failed."""
