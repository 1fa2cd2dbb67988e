"""How time and use of the chips go with the number of GPUs: the same global batch over more and more of them.

Stages do the same whatever the copies of the model, so layouts that have been traced once are timed again at every
number of GPUs; only the rows of each copy, the optimizer's share, the rows that wait and the messages over the copies
change. Further layouts are asked for as long as one promises more, at whichever number of GPUs (`further`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from megavlm.build.model import with_layout
from megavlm.build.run_config import RunConfig
from megavlm.plan.choice import Choice
from megavlm.plan.cluster import Cluster
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.profile import OpCost, RowProfile, StageProfile
from megavlm.plan.search import refusal, with_rows
from megavlm.plan.step import BUBBLE, IMBALANCE, MESSAGES, DrawnRows, Rate, StepTime, step_time

FEWEST, MOST = 8, 4096
WORTH_NAMING = 0.05
"""Share of the step from which on something is said to limit it."""
BATCH = "the recipe's batch"
Drawn = Callable[[Choice, int, int], DrawnRows | None]
"""(layout as it was traced, microbatches, replicas) -> tokens and images of each, of rows as full as there."""
Rows = Callable[[Choice], float]
"""Of a step in a layout."""
Timed = Mapping[int, Sequence[Evaluation]]
"""GPUs -> the known layouts there, those that do not fit included."""
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


class Further(Protocol):
    """Whoever finds further layouts."""

    def more(self, timed: Timed) -> Evaluation | None:
        """One more layout, judged at some number of GPUs; none where no other promises more, or it is late."""

    def unseen(self) -> str | None:
        """Why not all that is promising was looked at; none where it was."""


class _Nothing:
    def more(self, timed: Timed) -> None:
        return None

    def unseen(self) -> None:
        return None


def scale(
    run: RunConfig,
    evaluations: Sequence[Evaluation],
    rate: Rate,
    *,
    rows: Rows | None = None,
    drawn: Drawn = lambda traced, microbatches, replicas: None,
    gpus: Sequence[int] | None = None,
    further: Further | None = None,
    finished: Finished = lambda one: one,
) -> list[ScalePoint]:
    """The fastest of the judged layouts, and of those that `further` judges, at each number of GPUs. `finished` adds
    what is not the model's: what it waits for data. `rows`: those of a step; none: as many as in the first layout."""
    assert evaluations
    cluster, most = evaluations[0].cluster, rows_of(evaluations[0])
    sizes = [cluster.with_gpus(count) for count in gpus or counts(cluster)]
    timer = _Timer(run, rate, drawn, rows or (lambda _: most), most)
    tables = [_Table(size) for size in sizes]
    waiting, further = list(evaluations), further or _Nothing()
    while waiting:
        for table in tables:
            table.add(waiting, timer)
        more = further.more({table.cluster.gpus: table.timed for table in tables})
        waiting = [more] if more else []
    return list(_with_efficiency([table.point(finished, further.unseen()) for table in tables]))


def rows_of(one: Evaluation) -> int:
    """Of a step, over all copies."""
    return one.microbatches * _copies(one, one.cluster.gpus)


def rows_at_once(choice: Choice, cluster: Cluster) -> int:
    """Rows that a step has at the least: one of each copy, and interleaved one of each stage that takes turns."""
    return choice.data_parallel(cluster.gpus) * (choice.pipeline if choice.chunks > 1 else 1)


def rows_suffice(run: RunConfig, choice: Choice, cluster: Cluster, rows: int) -> bool:
    """Whether each copy of the model gets a row, of about as many as there are. Interleaved stages that take turns may
    have twice as many, half as full, where there are samples for them."""
    in_turns = max(rows, min(2 * rows, run.samples_per_step))
    return choice.data_parallel(cluster.gpus) <= rows and rows_at_once(choice, cluster) <= in_turns


@dataclass
class _Table:
    """What is known of one number of GPUs."""

    cluster: Cluster
    timed: list[Evaluation] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)
    """(rows that the layout takes, why it does not work)."""

    def add(self, known: Sequence[Evaluation], timer: _Timer) -> None:
        for one in known:
            again = timer.again(one, self.cluster)
            if isinstance(again, Evaluation):
                self.timed.append(again)
            problem = again if isinstance(again, str) else again.misfit
            self.problems.append((rows_at_once(one.choice, self.cluster), problem))

    def point(self, finished: Finished, unseen: str | None) -> ScalePoint:
        found = [finished(one) for one in self.timed if one.fits]
        if found:
            fastest = min(found, key=lambda one: one.seconds)
            return ScalePoint(self.cluster.gpus, fastest, limit(fastest.step))
        return ScalePoint(self.cluster.gpus, None, unseen or min(self.problems)[1])


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


class _Timer(NamedTuple):
    """Times layouts on other numbers of GPUs."""

    run: RunConfig
    rate: Rate
    drawn: Drawn
    rows: Rows
    most: int
    """Copies of the model that get a row each."""

    def again(self, known: Evaluation, cluster: Cluster) -> Evaluation | str:
        """A judged layout on another number of GPUs; why the trainer would not take it there."""
        if cluster.gpus % known.choice.model_parallel:
            return f"{cluster.gpus} GPUs do not divide into copies of {known.choice.model_parallel}"
        if not rows_suffice(self.run, known.choice, cluster, self.most):
            copies = _copies(known, cluster.gpus)
            turns = f" of {known.choice.pipeline} stages in turns" if copies <= self.most else ""
            return f"{BATCH} ({self.most:,} rows for {copies:,} copies of the model{turns})"
        choice = with_rows(self.run, replace(known.choice, rows_multiple=None), cluster)
        return refusal(self.run, choice, cluster) or self._timed(known, choice, cluster)

    def _timed(self, known: Evaluation, choice: Choice, cluster: Cluster) -> Evaluation:
        run, copies = self.run, _copies(known, cluster.gpus)
        microbatches = math.ceil(self.rows(choice) / copies)
        if choice.chunks > 1:
            microbatches = -(-microbatches // choice.pipeline) * choice.pipeline
        shards = _copies(known, known.cluster.gpus) / copies if run.data_parallel.use_distributed_optimizer else 1.0
        change = _Change(rows_of(known) / (microbatches * copies), shards, microbatches / known.microbatches)
        profiles = tuple(_profile(profile, change) for profile in known.profiles)
        step = step_time(
            profiles,
            cluster,
            with_layout(choice.apply(run)).parallel,
            microbatches,
            self.rate,
            data_parallel=run.data_parallel,
            rows=self.drawn(known.choice, microbatches, copies),
        )
        return replace(known, choice=choice, cluster=cluster, profiles=profiles, step=step, microbatches=microbatches)


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
