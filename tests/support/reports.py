"""Reports of steps that never ran, for what is told of them."""

from __future__ import annotations

from typing import Any, cast

import torch

from megavlm.build.model import Model
from megavlm.build.run_config import LogConfig, RunConfig
from megavlm.parallel.groups import Groups
from megavlm.recipes import recipe
from megavlm.train.report import RunStart, StepReport, StepWork


def logging_run(log_interval: int = 1, **log: Any) -> RunConfig:
    run = recipe("decoder-tiny")
    return run.replace(log=LogConfig(**log), train=run.train.replace(log_interval=log_interval))


def groups_of_one(speaks: bool = True, world_size: int = 1) -> Groups:
    """A rank that has nothing to compute, and maybe the word."""
    return Groups(
        device=torch.device("cpu"),
        rank=0,
        world_size=world_size,
        tensor_rank=0 if speaks else 1,
        pipeline_rank=0,
        pipeline_size=1,
        data_rank=0,
        data_size=1,
        collection=cast(Any, None),
    )


def start_of(run: RunConfig, first_iteration: int = 1) -> RunStart:
    return RunStart(run=run, groups=groups_of_one(), model=cast(Model, None), first_iteration=first_iteration)


def work_of(**changes: int) -> StepWork:
    work = {"samples": 16, "rows": 16, "tokens": 1024, "row_tokens": 1024, "target_tokens": 1008}
    pictures = {"images": 0, "tiles": 0, "seeing_tokens": 0, "squared_lengths": 16 * 64**2}
    return StepWork(**{**work, **pictures, **changes})


def report_of(iteration: int, **changes: Any) -> StepReport:
    values: dict[str, Any] = {
        "iteration": iteration,
        "train_iters": 100,
        "consumed_samples": 16 * iteration,
        "losses": {"lm loss": 5.0 / iteration},
        "learning_rates": {"": 1e-3},
        "grad_norm": 1.0,
        "applied": True,
        "skipped": 0,
        "nan": 0,
        "seconds": 0.5,
        "waited": 0.125,
        "work": work_of(),
    }
    return StepReport(**{**values, **changes})
