"""What the input pipeline must deliver for a plan to come true, and what a step waits where CPU cores cannot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megavlm.build.run_config import RunConfig
from megavlm.plan.cluster import Cluster
from megavlm.plan.cost import Decoding
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.mix import Mix

DATA = "data"


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Of a GPU that encodes pictures; each reads and decodes those alone that it encodes."""

    pictures: float
    """In a step."""
    tiles: float
    """In a step."""
    step: float
    """Seconds that the step takes when no data are waited for."""
    gpus_of_node: int
    """That encode, on a node where all do."""
    core_seconds: float
    """That reading, decoding and cutting take in a step."""
    threads: int
    """Of a rank's loader; 0: it reads in the main thread, while nothing else is done."""
    cores: float
    """Of the machine, for each GPU."""

    @property
    def needed(self) -> float:
        """Cores that keep up with the GPU."""
        return self.core_seconds / self.step

    @property
    def at_work(self) -> float:
        """Cores that its threads have."""
        return min(self.cores, max(self.threads, 1))

    @property
    def waits(self) -> float:
        """Seconds that a step takes longer for it."""
        taken = self.core_seconds / self.at_work
        return taken if self.threads == 0 else max(taken - self.step, 0.0)

    @property
    def pictures_per_second(self) -> float:
        return self.pictures / self.step

    @property
    def tiles_per_second(self) -> float:
        return self.tiles / self.step


def loading_of(run: RunConfig, one: Evaluation, mix: Mix, decoding: Decoding) -> Loading | None:
    """Of a judged layout; none where there are no pictures."""
    if run.data is None or not mix.pictures:
        return None
    # The first stage's ranks encode a picture each by turns, or those of all stages, ahead of the schedule.
    stages = 1 if one.choice.towers_everywhere else one.choice.pipeline
    gpus = one.cluster.gpus / stages
    pictures, tiles = mix.pictures / gpus, mix.tiles / gpus
    return Loading(
        pictures=pictures,
        tiles=tiles,
        step=one.seconds - one.step.split[DATA],
        gpus_of_node=min(one.cluster.gpus_per_node, int(gpus)),
        core_seconds=max(pictures / decoding.pictures, tiles / decoding.tiles),
        threads=run.data.threads,
        cores=one.cluster.cores_per_gpu,
    )


def with_loading(run: RunConfig, one: Evaluation, mix: Mix, decoding: Decoding) -> Evaluation:
    """The layout with what its steps wait for data."""
    loading = loading_of(run, one, mix, decoding)
    if loading is None or not loading.waits:
        return one
    split = {**one.step.split, DATA: loading.waits}
    return replace(one, step=replace(one.step, seconds=loading.step + loading.waits, split=split))


def loading_lines(loading: Loading) -> Iterator[str]:
    """What is to be delivered, and what that takes."""
    node = loading.gpus_of_node
    yield (
        f"to keep up, the loader reads and decodes {loading.pictures_per_second:,.1f} pictures/s "
        f"({loading.tiles_per_second:,.1f} tiles/s) for a GPU, {node * loading.pictures_per_second:,.0f} "
        f"({node * loading.tiles_per_second:,.0f}) for a node"
    )
    yield (
        f"that takes {loading.needed:.1f} CPU cores a GPU; it has {loading.threads} threads (--num-workers) on "
        f"{loading.cores:g} cores"
    )
    if loading.waits:
        yield _remedy(loading)


def _remedy(loading: Loading) -> str:
    said = f"each step waits {loading.waits:.3g} s for data"
    if loading.threads == 0:
        return f"{said}, which 0 threads read while nothing is computed: use --num-workers {_threads(loading)}"
    if loading.at_work < min(loading.needed, loading.cores):
        return f"{said}: use --num-workers {_threads(loading)}"
    return f"{said}: use more CPU cores for each GPU, or smaller pictures"


def _threads(loading: Loading) -> int:
    return max(1, int(min(loading.needed + 1, loading.cores)))


def loading_assumptions(decoding: Decoding, cluster: Cluster) -> list[str]:
    """What was taken for granted."""
    return [
        f"a CPU core reads, decodes and cuts {decoding.pictures:g} pictures or {decoding.tiles:g} tiles a second, "
        f"whichever takes longer: {decoding.source}",
        f"{cluster.cores_per_gpu:g} CPU cores for each GPU; files come as fast as they are asked for",
    ]
