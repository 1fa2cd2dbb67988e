"""Steps of a run as its loader plans them, from prepared data or as assumed: the samples, the rows, who reads which."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from megavlm.build.data_check import refuse_absent
from megavlm.build.loader import build_words
from megavlm.build.run_config import DataConfig, ParallelConfig, RecomputeConfig, RunConfig
from megavlm.data.balance import totals
from megavlm.data.formats import SampleFormat
from megavlm.data.order import StreamConfig
from megavlm.data.packing import PackLimits, StepPacking, apply_limit, deal_rows, pack_step
from megavlm.data.step_plan import Planner, StepPlan, open_sources, packing_costs
from megavlm.plan.assumed import draw_stream
from megavlm.plan.rows import PlannedDocument, PlannedRow
from megavlm.tiles import GridConfig, ImagePlan, Ints, MediaKind, plan_image

FEWEST, MOST = 4, 256
SAMPLES = 60_000
"""So many steps are looked at that they hold about as many samples, within the two above."""


@dataclass(frozen=True, eq=False)
class SeenStep:
    """A step: its samples, and the rows that they are packed into."""

    tokens: Ints
    """[samples], held to the recipe's limit; none of those that are left out."""
    tiles: Ints
    """[samples]"""
    pictures: Ints
    """[samples], each perhaps several tiles."""
    packing: StepPacking
    document: Callable[[int], PlannedDocument]
    """A sample of the step."""

    @functools.cached_property
    def row_tiles(self) -> Ints:
        """[rows]"""
        return totals(self.tiles[None], self.packing.row_of, self.packing.rows)[0]

    @functools.cached_property
    def sizes(self) -> Ints:
        """[rows, 2]: tokens with padding, and tiles; rows may be empty."""
        return np.stack([self.packing.row_lengths, self.row_tiles], axis=1)

    @functools.cached_property
    def unevenness(self) -> float:
        """What the costliest bundle of rows costs, over what they cost in the mean."""
        costs = self.packing.row_costs.sum(0).reshape(self.packing.limits.rows_multiple, -1).sum(1)
        return float(costs.max() / costs.mean()) if costs.any() else 1.0

    @functools.cached_property
    def planned(self) -> tuple[PlannedRow, ...]:
        """All rows."""
        return tuple(map(self.row, range(self.packing.rows)))

    def row(self, number: int) -> PlannedRow:
        """One of them; samples that are left out are not in it."""
        samples = self.packing.samples(number)
        documents = tuple(self.document(sample) for sample in samples[self.tokens[samples] > 0].tolist())
        return PlannedRow(documents, int(self.packing.row_lengths[number]))


class Dealt(NamedTuple):
    """The rows of a step, dealt to the copies of the model."""

    step: SeenStep
    """Packed for so many copies."""
    rows: Ints
    """[copies, microbatches], in the order in which they are computed."""


@functools.lru_cache(maxsize=64)
def dealt(step: SeenStep, microbatches: int, copies: int) -> Dealt | None:
    """As the loader deals them; packed again where the rows, as they are, are no such number; none where they cannot
    be."""
    packing = step.packing
    if packing.rows != microbatches * copies or packing.limits.rows_multiple % copies:
        limits = packing.limits.replace(rows_multiple=microbatches * copies)
        packing = pack_step(step.tokens, step.tiles, limits, packing_costs(step.tokens, step.tiles))
    if packing.rows != microbatches * copies:
        return None
    return Dealt(replace(step, packing=packing), deal_rows(packing, copies))


def _count(data: DataConfig) -> int:
    return min(max(SAMPLES // data.samples_per_step, FEWEST), MOST)


def prepared_steps(run: RunConfig, data: DataConfig) -> tuple[SeenStep, ...]:
    """Steps spread over the run."""
    refuse_absent(data)
    return _prepared(run.replace(parallel=ParallelConfig(), recompute=RecomputeConfig()), data)


@functools.lru_cache(maxsize=16)
def _prepared(run: RunConfig, data: DataConfig) -> tuple[SeenStep, ...]:
    words = build_words(run)
    planner = Planner(data, open_sources(data, words), words, run.train.seed)
    last, count = min(run.train.train_iters, planner.order.steps or run.train.train_iters), _count(data)
    numbers = sorted({last * number // count for number in range(count)})
    return tuple(_of_plan(planner.plan(number), words) for number in numbers)


def _of_plan(plan: StepPlan, words: SampleFormat) -> SeenStep:
    pictures = np.zeros_like(plan.tokens)
    for places, table in plan.pictures.values():
        begun = np.concatenate([[0], np.cumsum(table.is_first)])
        pictures[places] = begun[table.offsets[1:]] - begun[table.offsets[:-1]]

    def document(sample: int) -> PlannedDocument:
        planned = words.plan(*plan.pictures_of(sample))
        return PlannedDocument(int(plan.tokens[sample]), tuple(picture.plan for picture in planned))

    return SeenStep(plan.tokens, plan.tiles, np.where(plan.is_dropped, 0, pictures), plan.packing, document)


def assumed_steps(run: RunConfig, data: DataConfig) -> tuple[SeenStep, ...]:
    """Steps drawn one after another."""
    return _assumed(data.streams, data.rows, _grid(run), run.aquila_vl is not None, run.train.seed, _count(data))


@functools.lru_cache(maxsize=32)
def _assumed(
    streams: tuple[StreamConfig, ...],
    rows: PackLimits,
    grid: GridConfig | None,
    is_spliced: bool,
    seed: int,
    count: int,
) -> tuple[SeenStep, ...]:
    return tuple(_packed(one, rows) for one in _drawn(streams, rows.max_tokens, grid, is_spliced, seed, count))


@functools.lru_cache(maxsize=8)
def _drawn(
    streams: tuple[StreamConfig, ...], limit: int, grid: GridConfig | None, is_spliced: bool, seed: int, count: int
) -> tuple[tuple[PlannedDocument, ...], ...]:
    draw = np.random.default_rng(seed)
    return tuple(
        tuple(
            document
            for stream in streams
            for document in _documents(stream, draw, stream.tokens_per_sample or limit, grid, is_spliced)
            if document.tokens
        )
        for _ in range(count)
    )


def _packed(documents: Sequence[PlannedDocument], limits: PackLimits) -> SeenStep:
    tokens = np.array([document.tokens for document in documents], np.int64)
    tiles = np.array([sum(picture.tiles for picture in document.pictures) for document in documents], np.int64)
    pictures = np.array([len(document.pictures) for document in documents], np.int64)
    packing = pack_step(tokens, tiles, limits, packing_costs(tokens, tiles))
    return SeenStep(tokens, tiles, pictures, packing, documents.__getitem__)


def _documents(
    stream: StreamConfig, draw: np.random.Generator, limit: int, grid: GridConfig | None, is_spliced: bool
) -> list[PlannedDocument]:
    """What a stream gives to a step, held to the recipe's limit; of no tokens where it is left out."""
    samples = draw_stream(stream, draw, has_eyes=grid is not None)
    plans = [_pictures(sample.pictures, grid) for sample in samples]
    text = np.array([sample.text for sample in samples], np.int64)
    spliced = [sum(plan.tokens - 1 for plan in own) if is_spliced else 0 for own in plans]
    held = apply_limit(text + spliced, text - [len(own) for own in plans], limit, "cut")
    return [PlannedDocument(tokens, own) for tokens, own in zip(held.tokens.tolist(), plans, strict=True)]


def _pictures(sizes: Sequence[tuple[int, int]], grid: GridConfig | None) -> tuple[ImagePlan, ...]:
    if grid is None:
        return ()
    kind: MediaKind = "one_of_several" if len(sizes) > 1 and grid.tiling == "grid" else "image"
    return tuple(_planned(*size, kind, grid) for size in sizes)


@functools.lru_cache(maxsize=4096)
def _planned(width: int, height: int, kind: MediaKind, grid: GridConfig) -> ImagePlan:
    return plan_image(width, height, kind, grid)


def _grid(run: RunConfig) -> GridConfig | None:
    """How pictures are cut; none: the model sees none."""
    if run.aquila_vl is not None:
        return run.aquila_vl.grid
    if run.infimm is None:
        return None
    tower = run.infimm.tower
    return GridConfig(tile_size=tower.image_size, patch_size=tower.patch_size, tiling="single")
