"""A run in its own layout on a cluster, judged: traced, then timed."""

from __future__ import annotations

import math

import numpy as np

from megavlm.build.run_config import RunConfig, check_for_world
from megavlm.plan.choice import Choice
from megavlm.plan.cluster import Cluster
from megavlm.plan.cost import Efficiency, seconds_of
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.mix import Mix
from megavlm.plan.profile import StageProfile
from megavlm.plan.stage import profile_run
from megavlm.plan.step import drawn_images, step_time


def judge(
    run: RunConfig, cluster: Cluster, mix: Mix, efficiency: Efficiency, choice: Choice | None = None
) -> Evaluation:
    """The run as it is, on all GPUs of the cluster; refuses what the trainer would."""
    check_for_world(run, cluster.gpus)
    copies = cluster.gpus // run.parallel.model_parallel_size
    microbatches = math.ceil(mix.rows / copies)
    profiles = tuple(profile_run(run, cluster.gpus, microbatches, {"mean": mix.mean, "worst": mix.worst}))
    values, counts = np.unique(mix.tiles_of_rows, return_counts=True)
    step = step_time(
        profiles,
        cluster,
        run.parallel,
        microbatches,
        seconds_of(cluster.chip.bf16_tflops * 1e12, cluster.chip.memory_gb_s * 1e9, efficiency),
        data_parallel=run.data_parallel,
        images=drawn_images(values, counts, microbatches, copies) if mix.tiles else None,
    )
    return Evaluation(
        choice=choice or choice_of(run),
        cluster=cluster,
        profiles=profiles,
        step=step,
        microbatches=microbatches,
        tokens=mix.tokens,
        images=mix.tiles,
        samples=run.samples_per_step,
        flops=mix.rows * row_flops(profiles, run.parallel.tensor_model_parallel_size),
    )


def row_flops(profiles: tuple[StageProfile, ...], tensor: int) -> float:
    """Floating-point operations of a mean row over all ranks of one copy, without what is computed again."""
    return tensor * sum(
        cost.flops
        for profile in profiles
        for cost in profile.mean.costs
        if cost.phase in ("forward", "backward") and cost.kind != "comm"
    )


def choice_of(run: RunConfig) -> Choice:
    """The run's own layout."""
    parallel = run.parallel
    return Choice(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        chunks=parallel.virtual_pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute=run.recompute.granularity,
        towers_everywhere=parallel.vision_over == "all_stages",
    )
