"""What trains: model, optimizer, schedule and checkpoints of a run on this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megavlm.build.model import Model, build_model
from megavlm.build.run_config import RunConfig
from megavlm.log import get_logger
from megavlm.parallel.groups import Groups
from megavlm.parallel.wrap import wrap_data_parallel
from megavlm.train.checkpointing import Checkpointing, train_state
from megavlm.train.feed import FedStep
from megavlm.train.optim import build_optimizer, learning_rates
from megavlm.train.step import StepResult, train_step
from megavlm.train.table import table, whole_parts

logger = get_logger(__name__)


@dataclass(frozen=True)
class Training:
    """A run, built."""

    run: RunConfig
    groups: Groups
    model: Model
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    checkpointing: Checkpointing

    def step(self, step: FedStep, stop: int) -> StepResult:
        """One optimizer step; `stop` is why this rank wants it to be the last one, or 0."""
        result = train_step(
            self.chunks,
            self.optimizer,
            step.batches,
            self.groups,
            self.model.inputs,
            sources=step.sources,
            stop=stop,
        )
        if result.applied:
            self.scheduler.step(increment=1)
        return result

    def learning_rates(self) -> Mapping[str, float]:
        """Those of the step to come."""
        return learning_rates(self.scheduler, self.run)


def build_training(run: RunConfig, groups: Groups) -> Training:
    """Everything a run needs but its data; weights as the run's settings say, not yet those of a checkpoint."""
    model = build_model(run, groups)
    chunks = wrap_data_parallel(list(model.chunks), run.data_parallel)
    optimizer, scheduler = build_optimizer(chunks, run)
    logger.info("training %s on %d processes", run.name, groups.world_size)
    logger.info("%s", table(whole_parts(model, groups), run.optimizer))
    checkpointing = Checkpointing(run, train_state(run, model, chunks, optimizer, scheduler, groups))
    return Training(run, groups, model, chunks, optimizer, scheduler, checkpointing)
