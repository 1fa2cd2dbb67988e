"""The optimizer of a run and its learning rate over the steps."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megavlm.build.run_config import RunConfig
from megavlm.parallel.wrap import make_optimizer


def build_optimizer(
    chunks: list[DistributedDataParallel], run: RunConfig
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW over the trainable parameters, and megatron-core's scheduler, which counts in steps here."""
    settings = run.optimizer
    warmup = settings.warmup_steps(run.train.train_iters)
    optimizer = make_optimizer(chunks, settings, run.data_parallel, run.precision.dtype)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        # A run shorter than its warm-up (a quick trial) just warms up.
        lr_decay_steps=max(run.train.train_iters, warmup + 1),
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=run.train.train_iters,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def learning_rates(scheduler: OptimizerParamScheduler, run: RunConfig) -> Mapping[str, float]:
    """Of the step to come: that of the run under "", and by part where it has another one.

    Asked of the schedule and not of the optimizer, which on some ranks has nothing to learn.
    """
    own = run.optimizer.rates.items()
    return {"": scheduler.get_lr({})} | {
        name: scheduler.get_lr({"max_lr": highest, "min_lr": lowest}) for name, (highest, lowest) in own
    }
