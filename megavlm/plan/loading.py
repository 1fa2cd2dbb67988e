"""What the input pipeline must deliver for a plan to come true, and what a step waits where CPU cores cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from megavlm.build.run_config import RunConfig
from megavlm.parallel.vision_parallel import deal_images
from megavlm.plan.cluster import Cluster
from megavlm.plan.cost import Decoding
from megavlm.plan.evaluation import Evaluation
from megavlm.plan.mix import Mix
from megavlm.plan.rows import PlannedRow
from megavlm.plan.seen import SeenStep, dealt

DATA = "data"


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Of GPUs that encode pictures; each reads and decodes those alone that it encodes."""

    pictures: float
    """In a step, of the GPU with most to decode."""
    tiles: float
    """In a step, of the same one."""
    pictures_of_node: float
    """In a step, of all GPUs of a node."""
    tiles_of_node: float
    step: float
    """Seconds that the step takes when no data are waited for."""
    core_seconds: float
    """That reading, decoding and cutting take in a step, of the GPU with most to decode."""
    threads: int
    """Of a rank's loader; 0: it reads in the main thread, while nothing else is done."""
    cores: float
    """Of the machine, for each GPU."""

    @property
    def needed(self) -> float:
        """Cores that keep up with that GPU."""
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

    @property
    def pictures_per_second_of_node(self) -> float:
        return self.pictures_of_node / self.step

    @property
    def tiles_per_second_of_node(self) -> float:
        return self.tiles_of_node / self.step


class _Share(NamedTuple):
    """Of the pictures and tiles of a copy of the model, in a step."""

    pictures: float
    tiles: float


def loading_of(run: RunConfig, one: Evaluation, mix: Mix, decoding: Decoding) -> Loading | None:
    """Of a judged layout; none where there are no pictures."""
    if run.data is None or not mix.pictures:
        return None
    copies = one.choice.data_parallel(one.cluster.gpus)
    shares = _shares(one, mix.step, copies)

    def core_seconds(share: _Share) -> float:
        pictures, tiles = share.pictures * mix.pictures, share.tiles * mix.tiles
        return max(pictures / decoding.pictures, tiles / decoding.tiles) / copies

    busiest = max(shares, key=core_seconds)
    encode = copies * len(shares)
    of_node = min(one.cluster.gpus_per_node, encode) / encode
    return Loading(
        pictures=busiest.pictures * mix.pictures / copies,
        tiles=busiest.tiles * mix.tiles / copies,
        pictures_of_node=of_node * mix.pictures,
        tiles_of_node=of_node * mix.tiles,
        step=one.seconds - one.step.split[DATA],
        core_seconds=core_seconds(busiest),
        threads=run.data.threads,
        cores=one.cluster.cores_per_gpu,
    )


def _shares(one: Evaluation, step: SeenStep | None, copies: int) -> list[_Share]:
    """Of each rank that encodes, as the trainer deals pictures: a picture's tiles stay together.

    Which copy of the model has more to decode changes from step to step, and the loader is ahead of them; which of its
    ranks does, hardly: so a rank's share is that of all copies.
    """
    everywhere = one.choice.towers_everywhere
    ranks = one.choice.model_parallel if everywhere else one.choice.tensor
    pictures, tiles = np.zeros(ranks), np.zeros(ranks)
    for rows in _dealt_together(step, one.microbatches, copies, everywhere):
        own_tiles = [picture.tiles for row in rows for picture in row.pictures]
        for rank, own in enumerate(deal_images(own_tiles, ranks)):
            pictures[rank] += len(own)
            tiles[rank] += sum(own_tiles[picture] for picture in own)
    if not pictures.any():
        return [_Share(1 / ranks, 1 / ranks)] * ranks
    return [
        _Share(*both) for both in zip((pictures / pictures.sum()).tolist(), (tiles / tiles.sum()).tolist(), strict=True)
    ]


def _dealt_together(
    step: SeenStep | None, microbatches: int, copies: int, everywhere: bool
) -> Iterator[Sequence[PlannedRow]]:
    """Rows whose pictures are dealt to ranks at once: a microbatch, or all of a copy's where it encodes them ahead."""
    if step is None:
        return
    if not everywhere:
        yield from ((row,) for row in step.planned)
        return
    found = dealt(step, microbatches, copies)
    if found is not None:
        for rows in found.rows.tolist():
            yield [found.step.planned[row] for row in rows]


def with_loading(run: RunConfig, one: Evaluation, mix: Mix, decoding: Decoding) -> Evaluation:
    """The layout with what its steps wait for data."""
    loading = loading_of(run, one, mix, decoding)
    if loading is None or not loading.waits:
        return one
    split = {**one.step.split, DATA: loading.waits}
    return replace(one, step=replace(one.step, seconds=loading.step + loading.waits, split=split))


def loading_lines(loading: Loading) -> Iterator[str]:
    """What is to be delivered, and what that takes."""
    yield (
        f"to keep up, the loader reads and decodes {loading.pictures_per_second:,.1f} pictures/s "
        f"({loading.tiles_per_second:,.1f} tiles/s) for the GPU with most of them, "
        f"{loading.pictures_per_second_of_node:,.0f} ({loading.tiles_per_second_of_node:,.0f}) for a node"
    )
    yield (
        f"that takes {loading.needed:.1f} CPU cores of that GPU; it has {loading.threads} threads (--num-workers) on "
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
