"""The lines of the log, in Megatron's words."""

from __future__ import annotations

import math
from collections.abc import Mapping

from megavlm.build.run_config import RunConfig
from megavlm.log import IterationStats, log_iteration
from megavlm.parallel.groups import Groups
from megavlm.train.callbacks.base import Callback
from megavlm.train.report import StepReport


class Console(Callback):
    """A line every `log_interval` steps: means of losses and times since the line before, as Megatron has them."""

    def __init__(self, run: RunConfig, groups: Groups) -> None:
        self._interval = run.train.log_interval
        self._speaks = groups.speaks
        self._reports: list[StepReport] = []
        self._skipped = self._nan = 0

    def after_step(self, report: StepReport) -> None:
        if not self._speaks:
            return
        self._reports.append(report)
        if report.iteration % self._interval == 0:
            log_iteration(self._stats(report))
            self._reports, self._skipped, self._nan = [], report.skipped, report.nan

    def _stats(self, last: StepReport) -> IterationStats:
        return IterationStats(
            iteration=last.iteration,
            train_iters=last.train_iters,
            consumed_samples=last.consumed_samples,
            elapsed_time_per_iteration_ms=1000 * sum(one.seconds for one in self._reports) / len(self._reports),
            learning_rate=last.learning_rates[""],
            global_batch_size=last.work.samples,
            losses=mean_losses([one.losses for one in self._reports]),
            grad_norm=last.grad_norm,
            skipped_iterations=last.skipped - self._skipped,
            nan_iterations=last.nan - self._nan,
        )


def mean_losses(found: list[Mapping[str, float]]) -> dict[str, float]:
    """Of each loss over the steps that have it; a step that was not finite counts where there is no other."""
    means = {}
    for name in dict.fromkeys(name for losses in found for name in losses):
        values = [losses[name] for losses in found if name in losses]
        finite = [value for value in values if math.isfinite(value)] or values
        means[name] = sum(finite) / len(finite)
    return means
