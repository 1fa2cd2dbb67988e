"""Weights & Biases: one run there for all starts of a run here."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.build.run_config import RunConfig
from megavlm.data.files import atomic_file
from megavlm.errors import UnavailableError
from megavlm.train.callbacks.metrics import Sink
from megavlm.train.callbacks.tensorboard import SAVE_BLOCKED, scalars, validation_scalars
from megavlm.train.callbacks.window import LoggedSteps
from megavlm.train.report import RunStart

ID_FILE = "wandb_run_id.txt"
"""In the folder of checkpoints: which run there is this run's."""


class WeightsAndBiases(Sink):
    """Sends the numbers that TensorBoard gets. Offline, too, as W&B's own variables say (WANDB_MODE=offline)."""

    name = "Weights & Biases"

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._there: Any = None

    def open(self, start: RunStart) -> None:
        import wandb  # here, for few have it

        log, save = self._run.log, self._run.checkpoint.save_to
        parent = log.wandb_save_dir or save or "."
        Path(parent).mkdir(parents=True, exist_ok=True)
        known = run_id(save, afresh=start.first_iteration == 1)
        try:
            self._there = wandb.init(
                project=log.wandb_project,
                name=log.wandb_exp_name or self._run.name,
                entity=log.wandb_entity,
                dir=parent,
                config=self._run.to_dict(),
                id=known,
                resume="allow" if known else None,
            )
        except wandb.Error as error:
            remedy = "log in with `wandb login`, set WANDB_MODE=offline, or leave --wandb-project out"
            raise UnavailableError("--wandb-project", log.wandb_project, f"cannot start: {error}", remedy) from None
        keep_run_id(save, self._there.id)

    def steps(self, logged: LoggedSteps) -> None:
        # A step that is trained again after a restart gives the same numbers; W&B keeps the first.
        self._there.log(scalars(logged), step=logged.last.iteration)

    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None:
        self._there.log(validation_scalars(losses), step=iteration)

    def saved(self, iteration: int, blocked_ms: float) -> None:
        self._there.log({SAVE_BLOCKED: blocked_ms}, step=iteration)

    def close(self, iteration: int) -> None:
        if self._there is not None:
            self._there.finish(exit_code=int(sys.exc_info()[0] is not None))  # an error on its way ends in `close` too


def run_id(save: str | None, afresh: bool) -> str | None:
    """The run there that this one goes on with; None where it starts a new one."""
    path = None if save is None else Path(save) / ID_FILE
    if afresh or path is None or not path.exists():
        return None
    return path.read_text(encoding="utf-8").strip() or None


def keep_run_id(save: str | None, found: str) -> None:
    """For the starts to come."""
    if save is not None:
        Path(save).mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(save) / ID_FILE) as file:
            file.write(found.encode() + b"\n")
