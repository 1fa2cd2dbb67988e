"""The books of a run: what its steps come to, and how long they took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from megavlm.build.run_config import RunConfig
from megavlm.train.feed import FedStep
from megavlm.train.report import StepReport
from megavlm.train.step import StepResult


class Progress:
    """Makes the report of each step."""

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._skipped = self._nan = 0
        self._began = time.perf_counter()

    def next_step(self) -> None:
        """A step's time begins; what happened since the report of the last one belongs to none."""
        self._began = time.perf_counter()

    def report(self, step: FedStep, result: StepResult, rates: Mapping[str, float], waited: float) -> StepReport:
        """What is told of a step that is done."""
        self._skipped += not result.applied
        self._nan += not result.applied  # bf16 and float32 have no loss scale that a step could be skipped for
        return StepReport(
            iteration=step.iteration,
            train_iters=self._run.train.train_iters,
            consumed_samples=step.iteration * self._run.samples_per_step,
            losses=result.losses,
            learning_rates=rates,
            grad_norm=result.grad_norm,
            applied=result.applied,
            skipped=self._skipped,
            nan=self._nan,
            seconds=time.perf_counter() - self._began,
            waited=waited,
            work=replace(step.work, target_tokens=result.target_tokens),
        )
