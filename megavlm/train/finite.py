"""Steps whose loss or gradient is not finite: named with their samples, and too many in a row stop the run."""

from __future__ import annotations

import torch.distributed as dist

from megavlm.build.run_config import TrainConfig
from megavlm.errors import DivergedError
from megavlm.log import get_logger
from megavlm.parallel.groups import Groups
from megavlm.train.feed import FedStep
from megavlm.train.step import StepResult

logger = get_logger(__name__)

_MOST_OF_STEP, _MOST_OF_ROW = 64, 32
"""How many samples a warning names."""


class FiniteCheck:
    """Looks at each step; every rank has one, and calls it behind each step."""

    def __init__(self, settings: TrainConfig, groups: Groups) -> None:
        self._most, self._groups = settings.max_nan_iterations, groups
        self._in_a_row: list[int] = []

    def after_step(self, step: FedStep, result: StepResult) -> None:
        """Warn of a step that changed nothing; raise, on every rank, behind the last one that is allowed."""
        if result.applied:
            self._in_a_row.clear()
            return
        self._in_a_row.append(step.iteration)
        first = self._first_bad(step, result)
        if self._groups.rank == 0:
            logger.warning(
                "step %d: the %s is not finite, so no weight was changed (%d in a row, the run stops at %d)%s; "
                "samples of the step: %s",
                step.iteration,
                "gradient" if result.loss_is_finite else "loss",
                len(self._in_a_row),
                self._most,
                first,
                _capped(step.samples(), _MOST_OF_STEP),
            )
        if len(self._in_a_row) >= self._most:
            error = DivergedError(
                "steps",
                self._in_a_row,
                "their loss or gradient was not finite, and no weight was changed",
                "look at the samples named above, lower --lr, or allow more by --max-nan-iterations",
            )
            error.printed_by_rank = 0
            raise error

    def _first_bad(self, step: FedStep, result: StepResult) -> str:
        """Of each data-parallel rank the first microbatch whose loss is not finite, in words; a collective."""
        mine = None
        if result.first_bad is not None and self._groups.tensor_rank == 0:
            mine = (self._groups.data_rank, result.first_bad, step.rows[result.first_bad])
        everyone: list[tuple[int, int, list[str]] | None] = [None] * self._groups.world_size
        dist.all_gather_object(everyone, mine)
        return "".join(
            f"; first in microbatch {microbatch + 1} of data-parallel rank {rank}: {_capped(names, _MOST_OF_ROW)}"
            for rank, microbatch, names in filter(None, everyone)
        )


def _capped(names: list[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
