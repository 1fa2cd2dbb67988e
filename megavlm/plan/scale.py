"""How time and use of the chips go with the number of GPUs: the same global batch over more and more of them.

Stages do the same whatever the copies of the model, so layouts that have been traced once are timed again with fewer
rows for each copy; only the optimizer's share and the messages over the copies change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

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
Images = Callable[[int, int], DrawnRows | None]
"""(microbatches, replicas) -> tokens and images of each."""


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


def scale(
    run: RunConfig,
    evaluations: Sequence[Evaluation],
    rate: Rate,
    *,
    images: Images = lambda microbatches, replicas: None,
    gpus: Sequence[int] | None = None,
) -> list[ScalePoint]:
    """The fastest of the judged layouts at each number of GPUs, up to the first that has more copies than rows."""
    assert evaluations
    cluster = evaluations[0].cluster
    points: list[ScalePoint] = []
    for count in gpus or counts(cluster):
        larger = cluster.with_gpus(count)
        timed = [_again(run, one, larger, rate, images) for one in evaluations]
        found = [one for one in timed if isinstance(one, Evaluation)]
        if found:
            fastest = min(found, key=lambda one: one.seconds)
            points.append(ScalePoint(count, fastest, limit(fastest.step)))
        else:
            points.append(ScalePoint(count, None, str(timed[0])))
        if all(_copies(one, count) > _rows(one) for one in evaluations):
            break  # still more GPUs have no rows either
    return list(_with_efficiency(points))


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
        "replicas with more images": step.split[IMBALANCE],
        "the optimizer": step.split["optimizer"],
    }
    names = {"dp": "data-parallel messages", "tp": "tensor-parallel messages"}
    for group, seconds in step.groups.items():
        name = names.get(group, "other messages")
        losses[name] = losses.get(name, 0.0) + seconds
    name = max(losses, key=lambda one: losses[one])
    share = losses[name] / step.seconds
    return f"{name} ({100 * share:.0f} %)" if share >= WORTH_NAMING else "computing"


def _again(run: RunConfig, known: Evaluation, cluster: Cluster, rate: Rate, images: Images) -> Evaluation | str:
    """A judged layout on another number of GPUs; why it does not work there."""
    if cluster.gpus % known.choice.model_parallel:
        return f"{cluster.gpus} GPUs do not divide into copies of {known.choice.model_parallel}"
    choice = with_rows(run, known.choice, cluster)
    problem = refusal(run, choice, cluster)
    if problem:
        return problem
    before, copies = _copies(known, known.cluster.gpus), _copies(known, cluster.gpus)
    rows = _rows(known)
    if copies > rows:
        return f"{copies:,} copies of the model share {rows:,} rows"
    microbatches = -(-rows // copies)
    if choice.chunks > 1:
        microbatches = -(-microbatches // choice.pipeline) * choice.pipeline
    fill = rows / (microbatches * copies)
    shards = before / copies if run.data_parallel.use_distributed_optimizer else 1.0
    profiles = tuple(_profile(profile, fill, shards) for profile in known.profiles)
    parallel = with_layout(choice.apply(run)).parallel
    step = step_time(
        profiles,
        cluster,
        parallel,
        microbatches,
        rate,
        data_parallel=run.data_parallel,
        rows=images(microbatches, copies),
    )
    found = replace(known, choice=choice, cluster=cluster, profiles=profiles, step=step, microbatches=microbatches)
    return found if found.fits else found.misfit


def _copies(known: Evaluation, gpus: int) -> int:
    return known.choice.data_parallel(gpus)


def _rows(known: Evaluation) -> int:
    """Of a step."""
    return known.microbatches * _copies(known, known.cluster.gpus)


def _profile(profile: StageProfile, fill: float, shards: float) -> StageProfile:
    """With rows filled to this share, and the optimizer's own share changed by this factor."""
    mean, worst = (_row(row, fill, shards) for row in (profile.mean, profile.worst))
    long = _row(profile.long, fill, shards) if profile.long else None
    return replace(profile, mean=mean, worst=worst, long=long)


def _row(row: RowProfile, fill: float, shards: float) -> RowProfile:
    memory = replace(row.memory, optimizer=int(row.memory.optimizer * shards))
    costs = tuple(_cost(cost, fill, shards) for cost in row.costs)
    return replace(row, costs=costs, memory=memory)


def _cost(cost: OpCost, fill: float, shards: float) -> OpCost:
    if cost.phase != "step":
        return replace(cost, flops=cost.flops * fill, bytes=cost.bytes * fill)
    if cost.part == "optimizer" and cost.kind != "comm":
        return replace(cost, flops=cost.flops * shards, bytes=cost.bytes * shards)
    return cost


def limits_named(points: Sequence[ScalePoint]) -> list[str]:
    """What limits a run from where on, in words."""
    said: list[str] = []
    for point in points:
        if point.evaluation and point.limit != "computing":
            name = point.limit.rpartition(" (")[0]
            if not any(name in line for line in said):
                said.append(f"from {point.gpus:,} GPUs on: {point.limit}")
    return said
