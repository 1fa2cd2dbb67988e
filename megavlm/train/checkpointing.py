"""The checkpoints of a training run: where it goes on, and after which steps it saves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megavlm.build.families import state_map_of
from megavlm.build.identity import model_identity
from megavlm.build.model import Model
from megavlm.build.run_config import RunConfig
from megavlm.checkpoint.frozen import frozen_digests, frozen_name
from megavlm.checkpoint.manager import CheckpointManager
from megavlm.checkpoint.state import TrainState
from megavlm.errors import CheckpointError
from megavlm.log import get_logger
from megavlm.parallel.groups import Groups

logger = get_logger(__name__)


def train_state(
    run: RunConfig,
    model: Model,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    groups: Groups,
) -> TrainState:
    """What a checkpoint of this run holds."""
    return TrainState(
        chunks=chunks,
        optimizer=optimizer,
        scheduler=scheduler,
        groups=groups,
        parts=model.parts(),
        state_map=state_map_of(run),
        run=run.to_dict(),
        identity=run_identity(run),
        seed=run.train.seed,
    )


def run_identity(run: RunConfig) -> dict[str, Any]:
    """What makes two runs train the same weights: the model's shape and which parts of it learn."""
    return {
        **model_identity(run),
        "trainable": sorted(run.trainable),
        "params_dtype": run.precision.params_dtype,
    }


class Checkpointing:
    """Saves and resumes as the run's settings say; does nothing where they name no folder."""

    def __init__(self, run: RunConfig, state: TrainState) -> None:
        self._settings, self._state = run.checkpoint, state
        self._frozen = frozen_digests(state)
        logger.info("frozen weights: %s", frozen_name(self._frozen) or "none")
        self._manager = self._manager_of(run.checkpoint.save_to) if run.checkpoint.save_to else None

    def resume(self) -> int:
        """The steps that are done: those of the latest checkpoint, which fills the state."""
        save, load = self._settings.save_to, self._settings.load_from
        if self._manager is not None:
            self._manager.open(self._state)
            step = self._manager.load_latest(self._state)
            if step is not None:
                return step
        if load is None or (save is not None and Path(load).resolve() == Path(save).resolve()):
            return 0
        step = self._manager_of(load).load_latest(self._state)
        if step is None:
            raise CheckpointError("--load", load, "holds no checkpoint", "name a folder that --save has filled")
        return step

    def after_step(self, step: int) -> float | None:
        """Save if it is time, and look after a save in the background; for how long a save stopped training, in ms."""
        if self._manager is None:
            return None
        self._manager.poll(self._state)
        interval = self._settings.save_interval
        if interval is None or step % interval:
            return None
        return self._manager.save(self._state, step)

    def wait(self) -> None:
        """Until a save in the background is on disk."""
        if self._manager is not None:
            self._manager.finish(self._state)

    def finish(self, step: int) -> float | None:
        """Save the end of the run, and wait until it is on disk; return for how many milliseconds that took, if it was
        not saved already."""
        if self._manager is None:
            return None
        self._manager.finish(self._state)
        took = None
        if self._manager.last_saved != step:
            began = time.perf_counter()
            self._manager.save(self._state, step)
            self._manager.finish(self._state)
            took = (time.perf_counter() - began) * 1000
        if self._manager.last_saved != step:
            remedy = "make room, and run the same command again"
            raise CheckpointError("--save", self._settings.save_to, f"the last step, {step}, is not saved", remedy)
        return took

    def check_frozen(self) -> None:
        """Where training ends or stops: that no bit of what is frozen has changed; every rank calls it.

        Not at each save: a core hashes 0.4 to 1.8 GB/s, so a frozen 13B decoder would hold each of them up for 15 to
        65 s. A checkpoint does not depend on it, for it refers to the weights that were saved before the first step.
        """
        if not self._frozen:
            return
        now = frozen_digests(self._state)
        changed = [name for name, digest in self._frozen.items() if now.get(name) != digest]
        if changed:
            problem = f"changed in training, one of {len(changed)}"
            error = CheckpointError(
                "frozen weights", changed[0], problem, "this must not be: report it, and check memory"
            )
            error.printed_by_rank = 0
            raise error
        logger.info("frozen weights unchanged: %s", frozen_name(now))

    def _manager_of(self, folder: str) -> CheckpointManager:
        settings = self._settings
        return CheckpointManager(
            folder,
            keep_last=settings.keep_last,
            keep_every=settings.keep_every,
            async_save=settings.async_save,
            load_previous_if_damaged=settings.load_previous_if_damaged,
            max_save_failures=settings.max_save_failures,
            digests=self._frozen,
        )
