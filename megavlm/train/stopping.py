"""Why a run stops before its last step: a signal, or its time is over. Any rank may want it, and all do it together."""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist

from megavlm import signals
from megavlm.build.run_config import TrainConfig
from megavlm.parallel.groups import Groups

EX_TEMPFAIL = 75
"""The exit code of a run that stopped early and saved: the same command goes on (sysexits.h)."""

_TIME_IS_OVER = 1000
"""Beside the numbers of signals."""


class Stopping:
    """What this rank wants is a number, 0 for going on; the largest of all ranks decides."""

    def __init__(self, settings: TrainConfig, groups: Groups) -> None:
        self._settings, self._groups = settings, groups

    def wanted(self) -> int:
        """By this rank, now."""
        minutes = self._settings.exit_duration_in_mins
        if minutes is not None and signals.seconds_running() >= 60 * minutes:
            return _TIME_IS_OVER
        return signals.noted()

    def agreed(self) -> str | None:
        """The reason to stop, if any rank has one; a collective."""
        wanted = torch.tensor(self.wanted(), device=self._groups.device)
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        return self.reason(int(wanted))

    def reason(self, agreed: int) -> str | None:
        """What the ranks agreed on, in words: the run is to end as soon as it can."""
        if agreed == _TIME_IS_OVER:
            return f"--exit-duration-in-mins {self._settings.exit_duration_in_mins:g}"
        if agreed:
            return signal.Signals(agreed).name
        return None

    def behind(self, iteration: int) -> str | None:
        """Why the run ends behind this step, when all that is due there is done."""
        interval = self._settings.exit_interval
        if interval is not None and iteration % interval == 0:
            return f"--exit-interval {interval}"
        return None
