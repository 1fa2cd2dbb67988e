"""How long a step takes, from what each stage does: its microbatches through the pipeline, then the optimizer.

Computation takes what a rate for each class of work says; messages what the cluster says. Tensor-parallel messages
stand in the way of computation. Those of data parallelism hide behind the last backward pass where the run overlaps
them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megavlm.build.run_config import DataParallelConfig, ParallelConfig
from megavlm.parallel.layout import AUTO
from megavlm.plan.cluster import Cluster
from megavlm.plan.pipeline import Floats, Pipeline, Work, simulate, work_of
from megavlm.plan.pipeline_program import Mode, Shape
from megavlm.plan.profile import Kind, OpCost, RowProfile, StageProfile

Rate = Callable[[OpCost], float]
"""Seconds of computing, of costs that are no messages."""

SHAPE_BYTES = 24
"""Three numbers that go ahead of each tensor."""
MOST_REPLICAS = 128
"""Of which the slowest is looked for; more are drawn from the same rows."""
COMMUNICATION, BUBBLE, MESSAGES, IMBALANCE = "communication", "bubble", "messages", "imbalance"
PARTS = ("tower", "connector", "cross_attention", "decoder", "head", "data", "optimizer")
SEE_TILES = ("tower", "connector", "cross_attention", "data")
"""Parts whose work goes with the tiles of a row."""
SPLIT = (*PARTS, COMMUNICATION, BUBBLE, MESSAGES, IMBALANCE)
"""What a step's time is split into: work by part of the model; messages between tensor- and data-parallel ranks;
waiting for other stages; for what they send; and for a replica with more images
or longer rows."""


class Bound(NamedTuple):
    """What holds a part of the model up."""

    kind: Kind
    share: float
    """Of its time."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """A step."""

    seconds: float
    split: Mapping[str, float]
    """Seconds by SPLIT, of the busiest stage; together the step."""
    bounds: Mapping[str, Bound]
    """By part, and of communication by group (tp, dp)."""
    busiest: int
    """The stage that the split is of."""
    pipeline: Pipeline
    before: float
    """Seconds of towers that encode ahead of the schedule."""
    groups: Mapping[str, float] = field(default_factory=dict)
    """Seconds of communication by group, of the busiest stage."""

    def share(self, name: str) -> float:
        """Of the step."""
        return self.split[name] / self.seconds if self.seconds else 0.0


class DrawnRows(NamedTuple):
    """Rows of all microbatches of some replicas, [microbatches, replicas] each."""

    lengths: Floats
    """Tokens, with padding."""
    tiles: Floats


def drawn_rows(sizes: Sequence[tuple[int, int]], microbatches: int, replicas: int, seed: int = 1234) -> DrawnRows:
    """Drawn from rows of these (tokens, tiles)."""
    draw = np.random.default_rng(seed)
    chosen = draw.integers(len(sizes), size=(microbatches, min(replicas, MOST_REPLICAS)))
    lengths, tiles = np.array(sizes, dtype=float).T
    return DrawnRows(lengths[chosen], tiles[chosen])


def step_time(
    profiles: Sequence[StageProfile],
    cluster: Cluster,
    parallel: ParallelConfig,
    microbatches: int,
    rate: Rate,
    *,
    data_parallel: DataParallelConfig | None = None,
    rows: DrawnRows | None = None,
    mode: Mode = "variable",
) -> StepTime:
    """A step of `microbatches` on each data-parallel rank, all of the mean row or of these."""
    reckoner = _Reckoner(profiles, cluster, parallel, microbatches, rate, data_parallel or DataParallelConfig(), mode)
    return reckoner.step(rows)


class _Reckoner:
    def __init__(
        self,
        profiles: Sequence[StageProfile],
        cluster: Cluster,
        parallel: ParallelConfig,
        microbatches: int,
        rate: Rate,
        data_parallel: DataParallelConfig,
        mode: Mode,
    ) -> None:
        self.profiles, self.cluster, self.parallel = profiles, cluster, parallel
        self.rate, self.data_parallel, self.mode = rate, data_parallel, mode
        self.tensor, self.stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        self.shape = Shape(self.stages, parallel.virtual_pipeline_model_parallel_size, microbatches)
        self.encodes_ahead = parallel.vision_over == "all_stages"
        self.layers = _layers(parallel, profiles)
        assert len(profiles) == self.stages

    def step(self, rows: DrawnRows | None) -> StepTime:
        work = self._work(None)
        even = simulate(self.shape, self._without_messages(work), self.mode)
        sent = simulate(self.shape, work, self.mode)
        drawn = sent if rows is None else simulate(self.shape, self._work(rows), self.mode)
        before = max(self._ahead(profile) for profile in self.profiles)
        busiest = int(even.busy[:, 0].argmax())
        reduce, rest = zip(*(self._ending(profile) for profile in self.profiles), strict=True)
        passed = drawn.finished.max(axis=1)
        seconds = before + max(passed + np.array(reduce)) + max(rest)
        split, bounds, groups = self._split(self.profiles[busiest])
        split[BUBBLE] = even.seconds - float(even.busy[busiest, 0])
        split[MESSAGES] = sent.seconds - even.seconds
        split[IMBALANCE] = drawn.seconds - sent.seconds
        left = seconds - sum(split.values())
        split[COMMUNICATION] += left
        groups["dp"] = groups.get("dp", 0.0) + left
        return StepTime(
            seconds=float(seconds),
            split={name: float(split[name]) for name in SPLIT},
            bounds=bounds,
            busiest=busiest,
            pipeline=drawn,
            before=before,
            groups={name: float(value) for name, value in groups.items() if value},
        )

    def _without_messages(self, work: Work) -> Work:
        return Work(work.forward, work.backward, np.zeros(self.stages))

    def _work(self, rows: DrawnRows | None) -> Work:
        """Durations of all chunks, of the mean row or of these."""
        times = {}
        for way, phases in {"forward": ("forward",), "backward": ("backward", "recompute")}.items():
            # [chunks, 1] + [chunks, 1] * [microbatches], and replicas behind.
            times[way] = self._chunks("mean", phases)[:, None, None]
            if rows is not None:
                mean = self.profiles[0].mean
                of_token, of_tile = (slope[:, None, None] for slope in self._slopes(phases))
                more = of_token * (rows.lengths - mean.length) + of_tile * (rows.tiles - mean.images)
                times[way] = np.maximum(times[way] + more, 0.0)
        return work_of(self.shape, times["forward"], times["backward"], self._transfers(), self._handshake())

    def _slopes(self, phases: tuple[str, ...]) -> tuple[Floats, Floats]:
        """Seconds of each chunk that one more token and one more tile take.

        The long row has the worst one's tokens and the mean one's tiles. Parts that see no tiles are left out of what
        tiles take: the worst row's documents are others, and so is what attention costs in them.
        """
        first = self.profiles[0]
        long = "mean" if first.long is None else "long"
        tokens = _row(first, long).length - first.mean.length
        tiles = first.worst.images - first.mean.images
        of_tokens = self._chunks(long, phases) - self._chunks("mean", phases)
        of_tiles = self._chunks("worst", phases, SEE_TILES) - self._chunks(long, phases, SEE_TILES)
        return of_tokens / tokens if tokens else 0.0 * of_tokens, of_tiles / tiles if tiles else 0.0 * of_tiles

    def _chunks(self, row: str, phases: tuple[str, ...], parts: Sequence[str] | None = None) -> Floats:
        """Seconds of each chunk: ends of the model in the first and the last, the rest by layers; of some parts."""
        seconds = np.zeros(self.shape.all_chunks)
        for stage, profile in enumerate(self.profiles):
            own = np.arange(stage, self.shape.all_chunks, self.stages)
            layers = self.layers[own]
            for cost in _row(profile, row).costs:
                if cost.phase not in phases or cost.group == "pp" or self._is_ahead(cost):
                    continue
                if parts is not None and cost.part not in parts:
                    continue
                if cost.part in ("tower", "connector", "data") and stage == 0:
                    seconds[0] += self._seconds(cost)
                elif cost.part == "head" and stage == self.stages - 1:
                    seconds[-1] += self._seconds(cost)
                else:
                    seconds[own] += self._seconds(cost) * (layers / layers.sum() if layers.any() else 1 / len(own))
        return seconds

    def _is_ahead(self, cost: OpCost) -> bool:
        return self.encodes_ahead and cost.part in ("tower", "data") and cost.phase == "forward"

    def _ahead(self, profile: StageProfile) -> float:
        per_row = sum(self._seconds(cost) for cost in profile.mean.costs if self._is_ahead(cost))
        return self.shape.microbatches * per_row

    def _seconds(self, cost: OpCost) -> float:
        if cost.kind != "comm":
            return self.rate(cost)
        span = self.cluster.span(cost.group, self.tensor, self.stages)
        return cost.count * self.cluster.collective_seconds(cost.op, cost.bytes / max(cost.count, 1), span)

    def _transfers(self) -> Floats:
        crossings = self.cluster.crossings(self.tensor, self.stages)
        sizes = [_message_bytes(profile.mean) for profile in self.profiles]
        return np.array(
            [self.cluster.p2p_seconds(size, far) if size else 0.0 for size, far in zip(sizes, crossings, strict=True)]
        )

    def _handshake(self) -> float:
        if self.stages == 1 or self.mode != "variable":
            return 0.0
        return self.cluster.p2p_seconds(SHAPE_BYTES, any(self.cluster.crossings(self.tensor, self.stages)))

    def _ending(self, profile: StageProfile) -> tuple[float, float]:
        """(seconds of reducing gradients, of all else behind the passes) that nothing hides."""
        reduce = rest = gather = 0.0
        for cost in profile.mean.costs:
            if cost.phase != "step":
                continue
            seconds = self._seconds(cost)
            if cost.group == "dp" and cost.op == "all_gather":
                gather += seconds
            elif cost.group == "dp":
                reduce += seconds
            else:
                rest += seconds
        if self.data_parallel.overlap_grad_reduce:
            reduce = max(0.0, reduce - self._passes(profile, ("backward", "recompute")))
        if self.data_parallel.overlap_param_gather:
            gather = max(0.0, gather - self._passes(profile, ("forward",)))
        return reduce, rest + gather

    def _passes(self, profile: StageProfile, phases: tuple[str, ...]) -> float:
        return sum(self._seconds(cost) for cost in profile.mean.costs if cost.phase in phases and cost.group != "pp")

    def _split(self, profile: StageProfile) -> tuple[dict[str, float], dict[str, Bound], dict[str, float]]:
        """(seconds by part, what bounds each, seconds of communication by group) of one stage, for a whole step."""
        split: dict[str, float] = dict.fromkeys(SPLIT, 0.0)
        kinds: dict[str, dict[Kind, float]] = defaultdict(lambda: defaultdict(float))
        groups: dict[str, float] = defaultdict(float)
        reduce, rest = self._ending(profile)
        hidden = 0.0
        for cost in profile.mean.costs:
            if cost.group == "pp" and cost.op == "p2p":
                continue
            seconds = self._seconds(cost) * (1 if cost.phase == "step" else self.shape.microbatches)
            name = COMMUNICATION if cost.kind == "comm" else cost.part if cost.part in PARTS else "decoder"
            split[name] += seconds
            if cost.kind == "comm":
                groups[cost.group] += seconds
            else:
                kinds[name][cost.kind] += seconds
            hidden += seconds if cost.phase == "step" else 0.0
        hidden -= reduce + rest
        split[COMMUNICATION] -= hidden
        groups["dp"] -= hidden
        bounds = {name: _bound(of_part) for name, of_part in kinds.items() if sum(of_part.values()) > 0}
        return split, bounds, dict(groups)


def _layers(parallel: ParallelConfig, profiles: Sequence[StageProfile]) -> Floats:
    """Of each chunk, as far as the layout says; else evenly over a stage's chunks."""
    letters = parallel.pipeline_model_parallel_layout
    if letters and letters != AUTO:
        return np.array([chunk.count("t") for chunk in letters.split("|")], dtype=float)
    chunks = parallel.virtual_pipeline_model_parallel_size
    return np.array([profile.layers / chunks for profile in profiles] * chunks)


def _row(profile: StageProfile, name: str) -> RowProfile:
    rows = {"mean": profile.mean, "worst": profile.worst, "long": profile.long}
    found = rows[name]
    assert found is not None
    return found


def _message_bytes(row: RowProfile) -> float:
    """Of one message to the next stage."""
    sent = [cost for cost in row.costs if cost.group == "pp" and cost.op == "p2p" and cost.phase == "forward"]
    count = sum(cost.count for cost in sent)
    return sum(cost.bytes for cost in sent) / count if count else 0.0


def _bound(kinds: Mapping[Kind, float]) -> Bound:
    kind = max(kinds, key=lambda name: kinds[name])
    return Bound(kind, kinds[kind] / sum(kinds.values()))
