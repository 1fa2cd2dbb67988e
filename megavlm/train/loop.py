"""The training loop."""

from __future__ import annotations

import time

from megavlm.build.model import Model, build_model
from megavlm.build.run_config import RunConfig
from megavlm.log import IterationStats, get_logger, log_iteration
from megavlm.model.freeze import count_parts
from megavlm.parallel.groups import Groups
from megavlm.parallel.wrap import gather_parameters, wrap_data_parallel
from megavlm.train.checkpointing import Checkpointing, train_state
from megavlm.train.feed import feed
from megavlm.train.optim import build_optimizer
from megavlm.train.step import train_step

logger = get_logger(__name__)


def train(run: RunConfig, groups: Groups) -> Model:
    """Train as the run says and return this process's part of the model."""
    model = build_model(run, groups)
    wrapped = wrap_data_parallel(list(model.chunks), run.data_parallel)
    optimizer, scheduler = build_optimizer(wrapped, run)
    logger.info("training %s on %d processes", run.name, groups.world_size)
    for count in count_parts(model.chunks):
        logger.info("%s: %d parameters on this rank, %d of them trained", count.part, count.parameters, count.trained)
    checkpointing = Checkpointing(run, train_state(run, model, wrapped, optimizer, scheduler, groups))
    done = checkpointing.resume()
    began = time.perf_counter()
    for iteration, batches in enumerate(feed(run, model, groups, done), done + 1):
        learning_rate = scheduler.get_lr({})  # a stage where all is frozen has no group to ask for
        result = train_step(wrapped, optimizer, batches, groups, model.inputs)
        scheduler.step(increment=1)
        if groups.speaks and iteration % run.train.log_interval == 0:
            elapsed = (time.perf_counter() - began) * 1000 / run.train.log_interval
            log_iteration(
                IterationStats(
                    iteration=iteration,
                    train_iters=run.train.train_iters,
                    consumed_samples=iteration * run.samples_per_step,
                    elapsed_time_per_iteration_ms=elapsed,
                    learning_rate=learning_rate,
                    global_batch_size=run.samples_per_step,
                    losses={"lm loss": result.loss},
                    grad_norm=result.grad_norm,
                    skipped_iterations=0 if result.applied else 1,
                )
            )
            began = time.perf_counter()
        checkpointing.after_step(iteration)
    checkpointing.finish(max(done, run.train.train_iters))
    gather_parameters(wrapped)
    return model
