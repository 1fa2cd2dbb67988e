"""A run in its own layout on a cluster, judged: traced, then timed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megavlm.build.costs import part_costs
from megavlm.build.model import with_layout
from megavlm.build.run_config import RunConfig, check_for_world
from megavlm.plan.choice import Choice
from megavlm.plan.cluster import Cluster
from megavlm.plan.cost import Efficiency, seconds_of
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.fp8 import fp8_products
from megavlm.plan.mix import Mix
from megavlm.plan.profile import StageProfile
from megavlm.plan.seen import dealt
from megavlm.plan.stage import Traces, profile_run
from megavlm.plan.step import DrawnRows, Rate, StepTime, drawn_rows, step_time


def judge(
    run: RunConfig,
    cluster: Cluster,
    mix: Mix,
    efficiency: Efficiency,
    choice: Choice | None = None,
    traces: Traces | None = None,
) -> Evaluation:
    """The run as it is, on all GPUs of the cluster; refuses what the trainer would. `traces`: of layouts before."""
    check_for_world(run, cluster.gpus)
    microbatches = microbatches_of(run, cluster, mix)
    profiles = tuple(profile_run(run, cluster.gpus, microbatches, mix.traced, traces))
    return Evaluation(
        choice=choice or choice_of(run),
        cluster=cluster,
        profiles=profiles,
        step=timed(run, cluster, mix, profiles, efficiency),
        microbatches=microbatches,
        tokens=mix.tokens,
        images=mix.tiles,
        samples=run.samples_per_step,
        flops=part_costs(run, mix.work).total,
        peak=logged_peak(run, cluster),
    )


def microbatches_of(run: RunConfig, cluster: Cluster, mix: Mix) -> int:
    """Of one data-parallel rank in a step."""
    return math.ceil(mix.rows / copies_of(run, cluster))


def copies_of(run: RunConfig, cluster: Cluster) -> int:
    """Of the model, on all GPUs."""
    return cluster.gpus // run.parallel.model_parallel_size


def timed(
    run: RunConfig, cluster: Cluster, mix: Mix, profiles: Sequence[StageProfile], efficiency: Efficiency
) -> StepTime:
    """A step of the run, whose stages have been traced."""
    microbatches = microbatches_of(run, cluster, mix)
    return step_time(
        profiles,
        cluster,
        with_layout(run).parallel,
        microbatches,
        rate_of(run, cluster, efficiency),
        data_parallel=run.data_parallel,
        rows=drawn_of(mix, microbatches, copies_of(run, cluster)),
    )


def drawn_of(mix: Mix, microbatches: int, copies: int) -> DrawnRows | None:
    """The rows of each microbatch of each copy of the model, as the loader deals those of a step; drawn from rows of
    their sizes where it would make another number of them; none where all are alike. They are as full as those of the
    mix, also where more of them would be emptier: what is traced is a row of the mix.
    """
    if len(set(mix.sizes)) <= 1:
        return None
    found = dealt(mix.step, microbatches, copies) if mix.step else None
    if found is None:
        return drawn_rows(mix.sizes, microbatches, copies)
    lengths, tiles = found.step.sizes[found.rows.T].astype(float).transpose(2, 0, 1)
    fuller = microbatches * copies / mix.rows
    return DrawnRows(fuller * lengths, fuller * tiles)


def rate_of(run: RunConfig, cluster: Cluster, efficiency: Efficiency) -> Rate:
    """Seconds of computing on the cluster's chip, in the run's number formats; refuses those that it lacks."""
    chip = cluster.chip
    peak = chip.flops_per_second(run.precision.dtype == torch.float32)
    return seconds_of(peak, chip.bytes_per_second, efficiency, fp8_products(run, chip, efficiency))


def logged_peak(run: RunConfig, cluster: Cluster) -> float:
    """What MFU is a share of: the bf16 peak whatever the run's format, as in training; on a chip that is faster in
    float32, as CPUs are, that.
    """
    if run.log.peak_tflops:
        return 1e12 * run.log.peak_tflops
    return 1e12 * max(cluster.chip.bf16_tflops, cluster.chip.fp32_tflops or 0.0)


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
