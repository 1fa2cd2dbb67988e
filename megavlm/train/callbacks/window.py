"""The steps between two entries of a log, as one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megavlm.build.run_config import RunConfig
from megavlm.parallel.groups import Groups
from megavlm.train.report import StepReport
from megavlm.train.throughput import Speedometer, Throughput


@dataclass(frozen=True, kw_only=True)
class LoggedSteps:
    """What a log says of the steps since its last entry."""

    last: StepReport
    losses: Mapping[str, float]
    """Means, as Megatron has them."""
    skipped: int
    """Of these steps, those that changed no weights."""
    nan: int
    """Of these, for a loss or gradient that was not finite."""
    throughput: Throughput


class Window:
    """Collects the steps of a run until it is time for an entry."""

    def __init__(self, run: RunConfig, groups: Groups) -> None:
        self._interval = run.train.log_interval
        self._speedometer = Speedometer(run, groups)
        self._reports: list[StepReport] = []
        self._skipped = self._nan = 0

    def add(self, report: StepReport) -> LoggedSteps | None:
        """A step; with it an entry every `log_interval` steps."""
        self._reports.append(report)
        if report.iteration % self._interval:
            return None
        found = LoggedSteps(
            last=report,
            losses=mean_losses([one.losses for one in self._reports]),
            skipped=report.skipped - self._skipped,
            nan=report.nan - self._nan,
            throughput=self._speedometer.over(self._reports),
        )
        self._reports, self._skipped, self._nan = [], report.skipped, report.nan
        return found


def mean_losses(found: list[Mapping[str, float]]) -> dict[str, float]:
    """Of each loss over the steps that have it; a step that was not finite counts where there is no other."""
    means = {}
    for name in dict.fromkeys(name for losses in found for name in losses):
        values = [losses[name] for losses in found if name in losses]
        finite = [value for value in values if math.isfinite(value)] or values
        means[name] = sum(finite) / len(finite)
    return means
