"""How fast a run is: real tokens and pictures a second, and the model's own operations by the chip's peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.build.costs import causal_work, part_costs, peak_tflops
from megavlm.build.run_config import RunConfig
from megavlm.parallel.groups import Groups
from megavlm.train.report import StepReport


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Over some steps."""

    seconds_per_step: float
    tokens_per_second: float
    """Of the whole run, without padding."""
    images_per_second: float
    tflops_per_gpu: float
    """The model's, as `build.costs` counts them: padding and what is recomputed add nothing."""
    mfu: float | None
    """That over the chip's peak; None where the peak is not known."""
    waited: float
    """The share of time in which the step waited for data."""


class Speedometer:
    """Of one run."""

    def __init__(self, run: RunConfig, groups: Groups) -> None:
        self._run, self._chips = run, groups.world_size
        self._peak = peak_tflops(run)

    def over(self, reports: Sequence[StepReport]) -> Throughput:
        """The throughput of at least one step."""
        seconds = sum(report.seconds for report in reports)
        work = [report.work for report in reports]
        tokens = sum(one.tokens for one in work)
        # Costs are linear in all of these, so the steps' sums cost what the steps do.
        costs = part_costs(
            self._run,
            causal_work(
                tokens,
                sum(one.squared_lengths for one in work),
                sum(one.tiles for one in work),
                sum(one.seeing_tokens for one in work),
            ),
        )
        tflops = costs.total / seconds / self._chips / 1e12
        return Throughput(
            seconds_per_step=seconds / len(reports),
            tokens_per_second=tokens / seconds,
            images_per_second=sum(one.images for one in work) / seconds,
            tflops_per_gpu=tflops,
            mfu=tflops / self._peak if self._peak else None,
            waited=sum(report.waited for report in reports) / seconds,
        )
