"""The lines of the log, in Megatron's words."""

from __future__ import annotations

from collections.abc import Mapping

from megavlm.build.run_config import RunConfig
from megavlm.log import THROUGHPUT, IterationStats, log_iteration, log_validation
from megavlm.parallel.groups import Groups
from megavlm.train.callbacks.base import Callback
from megavlm.train.callbacks.window import LoggedSteps, Window
from megavlm.train.report import StepReport
from megavlm.train.throughput import Throughput


class Console(Callback):
    """A line every `log_interval` steps: means of losses and times since the line before, as Megatron has them."""

    def __init__(self, run: RunConfig, groups: Groups) -> None:
        self._speaks, self._says_speed = groups.speaks, run.log.log_throughput
        self._window = Window(run, groups)

    def after_step(self, report: StepReport) -> None:
        logged = self._window.add(report) if self._speaks else None
        if logged is not None:
            log_iteration(self._stats(logged))

    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None:
        if self._speaks:
            log_validation(iteration, losses)

    def _stats(self, logged: LoggedSteps) -> IterationStats:
        last = logged.last
        return IterationStats(
            iteration=last.iteration,
            train_iters=last.train_iters,
            consumed_samples=last.consumed_samples,
            elapsed_time_per_iteration_ms=1000 * logged.throughput.seconds_per_step,
            learning_rate=last.learning_rates[""],
            global_batch_size=last.work.samples,
            losses=logged.losses,
            grad_norm=last.grad_norm,
            skipped_iterations=logged.skipped,
            nan_iterations=logged.nan,
            throughput=speeds(logged.throughput) if self._says_speed else {},
        )


def speeds(throughput: Throughput) -> dict[str, float]:
    """The figures by their words."""
    mfu = {} if throughput.mfu is None else {"MFU (%)": 100 * throughput.mfu}
    return {
        THROUGHPUT: throughput.tflops_per_gpu,
        **mfu,
        "tokens/s": throughput.tokens_per_second,
        "images/s": throughput.images_per_second,
        "waited for data (%)": 100 * throughput.waited,
    }
