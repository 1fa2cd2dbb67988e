"""TensorBoard, under Megatron's names where it has them: its dashboards go on working."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megavlm.train.callbacks.metrics import Sink
from megavlm.train.callbacks.window import LoggedSteps
from megavlm.train.report import RunStart


class TensorBoard(Sink):
    """Scalars in a folder of event files."""

    name = "TensorBoard"

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._writer: Any = None

    def open(self, start: RunStart) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, for few have its package and it loads slowly

        # Readers then pass over what was written of the steps to come before the run was stopped.
        self._writer = SummaryWriter(self._folder, purge_step=start.first_iteration)
        self._writer.add_text("run", f"```\n{start.run.to_yaml()}```", start.first_iteration - 1)

    def steps(self, logged: LoggedSteps) -> None:
        self._add(scalars(logged), logged.last.iteration)

    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None:
        self._add(validation_scalars(losses), iteration)

    def saved(self, iteration: int, blocked_ms: float) -> None:
        self._add({SAVE_BLOCKED: blocked_ms}, iteration)

    def close(self, iteration: int) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, values: Mapping[str, float], iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()


SAVE_BLOCKED = "save-blocked-ms"


def scalars(logged: LoggedSteps) -> dict[str, float]:
    """A dashboard's numbers of some steps by name: Megatron's names where it has such a number."""
    last, speed = logged.last, logged.throughput
    values = {
        **logged.losses,
        **{f"learning-rate/{part}" if part else "learning-rate": rate for part, rate in last.learning_rates.items()},
        "grad-norm": last.grad_norm,
        "batch-size": last.work.samples,
        "consumed-samples": last.consumed_samples,
        "skipped-iterations": last.skipped,
        "nan-iterations": last.nan,
        "iteration-time": speed.seconds_per_step,
        "throughput": speed.tflops_per_gpu,
        "tokens-per-second": speed.tokens_per_second,
        "images-per-second": speed.images_per_second,
        "waited-for-data": speed.waited,
        "padding": 1 - last.work.tokens / max(last.work.row_tokens, 1),
    }
    return values if speed.mfu is None else {**values, "mfu": speed.mfu}


def validation_scalars(losses: Mapping[str, float]) -> dict[str, float]:
    """Of an evaluation, as Megatron calls it."""
    return {f"{name} validation": loss for name, loss in losses.items()}
