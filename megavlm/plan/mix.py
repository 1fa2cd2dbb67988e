"""What a step's rows are like, from the prepared data or as assumed: the mean row, the worst one, and how many."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megavlm.build.costs import Work, causal_work
from megavlm.build.data_check import refuse_absent
from megavlm.build.loader import build_words
from megavlm.build.run_config import DataConfig, RunConfig
from megavlm.data.packing import StepPacking, apply_limit, pack_step
from megavlm.data.step_plan import Planner, open_sources
from megavlm.plan.assumed import AssumedSample, draw_stream, kind_of
from megavlm.plan.rows import PlannedDocument, PlannedRow
from megavlm.tiles import GridConfig, ImagePlan, MediaKind, plan_image

STEPS = 4
"""Of real data, the steps that are looked at, spread over the run."""


@dataclass(frozen=True)
class Mix:
    """The rows of a step."""

    mean: PlannedRow
    """The one that is nearest to the mean in length and in tiles."""
    worst: PlannedRow
    """As many tiles as any row has, and as long as the longest."""
    long: PlannedRow
    """The mean one with more words, as long as the longest: what tokens cost without tiles."""
    rows: float
    """Of a step, over all data-parallel ranks."""
    tokens: float
    """Of a step, without padding."""
    tiles: float
    """Images or tiles of a step."""
    squared_lengths: float
    """Of the samples of a step, summed up."""
    seeing_tokens: float
    """Of the samples of a step that have a picture."""
    sizes: tuple[tuple[int, int], ...]
    """(tokens with padding, tiles) of each row that was looked at."""
    assumptions: tuple[str, ...]
    """What was assumed of the data; empty where prepared data say it."""
    pictures: float = 0.0
    """Of a step, each perhaps several tiles."""

    @property
    def traced(self) -> dict[str, PlannedRow]:
        """What a profile is made of, by name."""
        return {"mean": self.mean, "worst": self.worst, "long": self.long}

    @property
    def work(self) -> Work:
        """What passes through the model in a step, as training counts it of the same rows."""
        return causal_work(self.tokens, self.squared_lengths, self.tiles, self.seeing_tokens)


def mix_of(run: RunConfig, from_data: bool) -> Mix:
    """From the run's prepared data, or as assumed."""
    if run.data is None:
        row = PlannedRow((PlannedDocument(run.row_tokens),), run.row_tokens, run.train.micro_batch_size)
        rows = run.samples_per_step / run.train.micro_batch_size
        says = f"toy text: rows of {run.row_tokens} tokens"
        squares = run.samples_per_step * float(run.row_tokens) ** 2
        return Mix(row, row, row, rows, rows * row.tokens, 0.0, squares, 0.0, ((row.padded, 0),), (says,))
    if from_data:
        return _summary(_prepared_steps(run, run.data), ())
    return _summary([_assumed_step(run, run.data)], _assumptions(run.data))


def _summary(steps: Sequence[Sequence[PlannedRow]], assumptions: tuple[str, ...]) -> Mix:
    rows = [row for step in steps for row in step if row.documents]
    documents = [document for row in rows for document in row.documents]
    table = np.array([[row.length, row.tiles] for row in rows], dtype=float)
    off = np.abs(table - table.mean(0)) / np.maximum(table.mean(0), 1)
    mean = rows[int(off.sum(1).argmin())]
    longest, most = max(rows, key=lambda row: row.length), max(rows, key=lambda row: (row.tiles, row.length))
    return Mix(
        mean=mean,
        worst=_lengthened(most, longest.length),
        long=_with_more_words(mean, longest.length - mean.length),
        rows=len(rows) / len(steps),
        tokens=sum(row.tokens for row in rows) / len(steps),
        tiles=sum(row.tiles for row in rows) / len(steps),
        squared_lengths=sum(one.tokens**2 for one in documents) / len(steps),
        seeing_tokens=sum(one.tokens for one in documents if one.pictures) / len(steps),
        sizes=tuple((row.padded, row.tiles) for row in rows),
        assumptions=assumptions,
        pictures=sum(len(row.pictures) for row in rows) / len(steps),
    )


def _lengthened(row: PlannedRow, length: int) -> PlannedRow:
    """With a longer last document."""
    *first, last = row.documents
    last = replace(last, tokens=last.tokens + length - row.tokens)
    return PlannedRow((*first, last), length)


def _with_more_words(row: PlannedRow, more: int) -> PlannedRow:
    """With so many more tokens in the last document, padded as before."""
    *first, last = row.documents
    return replace(row, documents=(*first, replace(last, tokens=last.tokens + more)), length=row.length + more)


def _prepared_steps(run: RunConfig, data: DataConfig) -> list[list[PlannedRow]]:
    """Some steps of the run, as its loader plans them."""
    refuse_absent(data)
    words = build_words(run)
    planner = Planner(data, open_sources(data, words), words, run.train.seed)
    last = min(run.train.train_iters, planner.order.steps or run.train.train_iters)
    found = []
    for step in sorted({last * number // STEPS for number in range(STEPS)}):
        plan = planner.plan(step)

        def document(sample: int, plan: object = plan) -> PlannedDocument:
            pictures = words.plan(*plan.pictures_of(sample))  # type: ignore[attr-defined]
            tokens = int(plan.tokens[sample])  # type: ignore[attr-defined]
            return PlannedDocument(tokens, tuple(picture.plan for picture in pictures))

        samples = [planner.samples_of(plan, row).tolist() for row in range(plan.packing.rows)]
        found.append(_rows(plan.packing, samples, document))
    return found


def _rows(
    packing: StepPacking, samples: Sequence[Sequence[int]], document: Callable[[int], PlannedDocument]
) -> list[PlannedRow]:
    lengths = packing.row_lengths.tolist()
    return [
        PlannedRow(tuple(document(sample) for sample in own), length)
        for own, length in zip(samples, lengths, strict=True)
    ]


def _assumed_step(run: RunConfig, data: DataConfig) -> list[PlannedRow]:
    draw = np.random.default_rng(run.train.seed)
    documents: list[PlannedDocument] = []
    for stream in data.streams:
        samples = draw_stream(stream, draw, run.infimm is not None or run.aquila_vl is not None)
        limit = stream.tokens_per_sample or data.rows.max_tokens
        documents += [_document(run, sample, limit) for sample in samples]
    documents = [document for document in documents if document.tokens]
    tokens = np.array([document.tokens for document in documents])
    tiles = np.array([sum(picture.tiles for picture in document.pictures) for document in documents])
    packing = pack_step(tokens, tiles, data.rows, _costs(tokens, tiles))
    samples_of = [packing.samples(row).tolist() for row in range(packing.rows)]
    return _rows(packing, samples_of, documents.__getitem__)


def _costs(tokens: NDArray[np.int64], tiles: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.stack([tokens * (1 + tokens / 36_000), tiles.astype(float)])


def _document(run: RunConfig, sample: AssumedSample, limit: int) -> PlannedDocument:
    """Held to the recipe's limit; of no tokens where it is left out."""
    alone: MediaKind = "image" if len(sample.pictures) == 1 else "one_of_several"
    grid = _grid(run)
    plans = tuple(_planned(*size, alone if grid.tiling == "grid" else "image", grid) for size in sample.pictures)
    spliced = sum(plan.tokens - 1 for plan in plans) if run.aquila_vl is not None else 0
    held = apply_limit([sample.text + spliced], [sample.text - len(plans)], limit, "cut")
    return PlannedDocument(int(held.tokens[0]), plans)


@functools.lru_cache(maxsize=4096)
def _planned(width: int, height: int, kind: MediaKind, grid: GridConfig) -> ImagePlan:
    return plan_image(width, height, kind, grid)


def _grid(run: RunConfig) -> GridConfig:
    if run.aquila_vl is not None:
        return run.aquila_vl.grid
    if run.infimm is None:
        return GridConfig(tiling="single")
    tower = run.infimm.tower
    return GridConfig(tile_size=tower.image_size, patch_size=tower.patch_size, tiling="single")


def _assumptions(data: DataConfig) -> tuple[str, ...]:
    said = []
    for stream in data.streams:
        for kind in dict.fromkeys(kind_of(source) for source in stream.sources):
            pictures = sum(number * share for number, share in enumerate(kind.pictures))
            said.append(
                f"{stream.name}: {kind.about}, median text {kind.text} tokens (spread {kind.spread:g}), "
                f"{pictures:.2g} pictures a sample"
            )
    return tuple(said)
