"""How time and use of the chips go with the number of GPUs: the same global batch over more and more of them.

Stages do the same whatever the copies of the model, so layouts that have been traced once are timed again with fewer
rows for each copy; only the optimizer's share, the rows that wait and the messages over the copies change. Where there
would be more copies than the recipe's batch has rows, a layout that cuts the model further is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megavlm.build.model import with_layout
from megavlm.build.run_config import RunConfig
from megavlm.plan.cluster import Cluster
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.profile import OpCost, RowProfile, StageProfile
from megavlm.plan.search import refusal, with_rows
from megavlm.plan.step import BUBBLE, IMBALANCE, MESSAGES, DrawnRows, Rate, StepTime, step_time

FEWEST, MOST = 8, 4096
WORTH_NAMING = 0.05
"""Share of the step from which on something is said to limit it."""
BATCH = "the recipe's batch"
Drawn = Callable[[int, int], DrawnRows | None]
"""(microbatches, replicas) -> tokens and images of each."""
Further = Callable[[Cluster, int], Evaluation | str | None]
"""(cluster, rows of a step) -> a layout judged there, of at most so many copies of the model; why none was looked for;
None: there is none. Its rows are as full as those of the first layout that is known."""
Finished = Callable[[Evaluation], Evaluation]


@dataclass(frozen=True)
class ScalePoint:
    """A number of GPUs."""

    gpus: int
    evaluation: Evaluation | None
    """The fastest layout; none where no traced layout works."""
    limit: str
    """What takes the most beside computing, or why nothing works."""
    efficiency: float = 0.0
    """Tokens a second of each GPU, over those with the fewest GPUs."""


def counts(cluster: Cluster) -> list[int]:
    """GPUs of 1, 2, 4, ... machines, and the cluster's own."""
    doubled = (cluster.gpus_per_node << times for times in range(MOST.bit_length()))
    return sorted({count for count in doubled if FEWEST <= count <= MOST} | {cluster.gpus})


class _Known(NamedTuple):
    """A layout that has been judged somewhere."""

    evaluation: Evaluation
    rows: int
    """Of a step, as full as they were there."""


def scale(
    run: RunConfig,
    evaluations: Sequence[Evaluation],
    rate: Rate,
    *,
    drawn: Drawn = lambda microbatches, replicas: None,
    gpus: Sequence[int] | None = None,
    further: Further = lambda cluster, rows: None,
    finished: Finished = lambda one: one,
) -> list[ScalePoint]:
    """The fastest of the judged layouts at each number of GPUs; where all of them have more copies than rows, of those
    that `further` judges. `finished` adds what is not the model's: what it waits for data."""
    assert evaluations
    cluster = evaluations[0].cluster
    known = [_Known(one, one.microbatches * _copies(one, cluster.gpus)) for one in evaluations]
    rows = known[0].rows
    points: list[ScalePoint] = []
    for count in gpus or counts(cluster):
        larger = cluster.with_gpus(count)
        if all(_copies(one.evaluation, count) > one.rows for one in known):
            more = further(larger, rows)
            if isinstance(more, str):
                points.append(ScalePoint(count, None, more))
                continue
            known += [_Known(more, rows)] if more else []
        points.append(_point(known, [_again(run, one, larger, rate, drawn) for one in known], larger, finished))
    return list(_with_efficiency(points))


def _point(
    known: Sequence[_Known], timed: Sequence[Evaluation | str], cluster: Cluster, finished: Finished
) -> ScalePoint:
    found = [finished(one) for one in timed if isinstance(one, Evaluation)]
    if found:
        fastest = min(found, key=lambda one: one.seconds)
        return ScalePoint(cluster.gpus, fastest, limit(fastest.step))
    fewest = min(known, key=lambda one: _copies(one.evaluation, cluster.gpus))
    copies = _copies(fewest.evaluation, cluster.gpus)
    if copies > fewest.rows:
        said = f"{BATCH} ({fewest.rows:,} rows for {copies:,} copies of the model)"
        return ScalePoint(cluster.gpus, None, said)
    return ScalePoint(cluster.gpus, None, str(timed[known.index(fewest)]))


def _with_efficiency(points: Sequence[ScalePoint]) -> Iterator[ScalePoint]:
    first = next((point for point in points if point.evaluation), None)
    for point in points:
        if first is None or first.evaluation is None or point.evaluation is None:
            yield point
            continue
        of_first = first.evaluation.tokens_per_second / first.gpus
        yield replace(point, efficiency=point.evaluation.tokens_per_second / point.gpus / of_first)


def limit(step: StepTime) -> str:
    """What takes the most of a step beside computing."""
    losses = {
        "the pipeline's bubble": step.split[BUBBLE],
        "messages between stages": step.split[MESSAGES],
        "replicas with longer rows or more images": step.split[IMBALANCE],
        "the optimizer": step.split["optimizer"],
        "reading and decoding pictures": step.split["data"],
    }
    names = {"dp": "data-parallel messages", "tp": "tensor-parallel messages"}
    for group, seconds in step.groups.items():
        name = names.get(group, "other messages")
        losses[name] = losses.get(name, 0.0) + seconds
    name = max(losses, key=lambda one: losses[one])
    share = losses[name] / step.seconds
    return f"{name} ({100 * share:.0f} %)" if share >= WORTH_NAMING else "computing"


def _again(run: RunConfig, layout: _Known, cluster: Cluster, rate: Rate, drawn: Drawn) -> Evaluation | str:
    """A judged layout on another number of GPUs; why it does not work there."""
    known, rows = layout
    if cluster.gpus % known.choice.model_parallel:
        return f"{cluster.gpus} GPUs do not divide into copies of {known.choice.model_parallel}"
    copies = _copies(known, cluster.gpus)
    if copies > rows:
        return f"{copies:,} copies of the model share {rows:,} rows"
    choice = with_rows(run, known.choice, cluster)
    problem = refusal(run, choice, cluster)
    if problem:
        return problem
    microbatches = -(-rows // copies)
    if choice.chunks > 1:
        microbatches = -(-microbatches // choice.pipeline) * choice.pipeline
    shards = _copies(known, known.cluster.gpus) / copies if run.data_parallel.use_distributed_optimizer else 1.0
    change = _Change(rows / (microbatches * copies), shards, microbatches / known.microbatches)
    profiles = tuple(_profile(profile, change) for profile in known.profiles)
    parallel = with_layout(choice.apply(run)).parallel
    step = step_time(
        profiles,
        cluster,
        parallel,
        microbatches,
        rate,
        data_parallel=run.data_parallel,
        rows=drawn(microbatches, copies),
    )
    found = replace(known, choice=choice, cluster=cluster, profiles=profiles, step=step, microbatches=microbatches)
    return found if found.fits else found.misfit


def _copies(known: Evaluation, gpus: int) -> int:
    return known.choice.data_parallel(gpus)


class _Change(NamedTuple):
    """What is different of a layout on another number of GPUs, as factors."""

    fill: float
    """Of each row."""
    shards: float
    """Of the optimizer's state on a rank."""
    waiting: float
    """Of the microbatches that wait on a rank from the beginning of the step."""


def _profile(profile: StageProfile, change: _Change) -> StageProfile:
    mean, worst = (_row(row, change) for row in (profile.mean, profile.worst))
    long = _row(profile.long, change) if profile.long else None
    return replace(profile, mean=mean, worst=worst, long=long)


def _row(row: RowProfile, change: _Change) -> RowProfile:
    held = row.memory
    memory = replace(held, optimizer=int(held.optimizer * change.shards), batch=math.ceil(held.batch * change.waiting))
    costs = tuple(_cost(cost, change) for cost in row.costs)
    return replace(row, costs=costs, memory=memory)


def _cost(cost: OpCost, change: _Change) -> OpCost:
    if cost.phase != "step":
        return replace(cost, flops=cost.flops * change.fill, bytes=cost.bytes * change.fill)
    if cost.part == "optimizer" and cost.kind != "comm":
        return replace(cost, flops=cost.flops * change.shards, bytes=cost.bytes * change.shards)
    return cost


def limits_named(points: Sequence[ScalePoint]) -> list[str]:
    """What limits a run from where on, in words."""
    said: list[str] = []
    for point in points:
        if (point.evaluation and point.limit != "computing") or point.limit.startswith(BATCH):
            name = point.limit.rpartition(" (")[0]
            if not any(name in line for line in said):
                said.append(f"from {point.gpus:,} GPUs on: {point.limit}")
    return said
