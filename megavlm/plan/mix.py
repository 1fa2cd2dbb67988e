"""What a step's rows are like, from the prepared data or as assumed: the mean row, the worst one, and how many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megavlm.build.costs import Work, causal_work
from megavlm.build.run_config import DataConfig, RunConfig
from megavlm.data.packing import LONGER, PackLimits
from megavlm.plan.assumed import kind_of
from megavlm.plan.rows import PlannedDocument, PlannedRow
from megavlm.plan.seen import SeenStep, assumed_steps, prepared_steps
from megavlm.tiles import Ints


@dataclass(frozen=True)
class Mix:
    """The rows of a step."""

    mean: PlannedRow
    """The one that is nearest to the mean in length and in tiles."""
    worst: PlannedRow
    """As many tiles as any row of the steps has, and as long as the longest or as packing makes rows to even them out.
    """
    long: PlannedRow
    """The mean one with more words, as long as the worst: what tokens cost without tiles."""
    rows: float
    """Of a step, over all data-parallel ranks: of most steps, where not all have equally many."""
    tokens: float
    """Of a step, without padding."""
    tiles: float
    """Images or tiles of a step."""
    squared_lengths: float
    """Of the samples of a step, summed up."""
    seeing_tokens: float
    """Of the samples of a step that have a picture."""
    sizes: tuple[tuple[int, int], ...]
    """(tokens with padding, tiles) of each row of such steps, empty ones as well, which are computed like others."""
    assumptions: tuple[str, ...]
    """What was assumed of the data; empty where prepared data say it."""
    pictures: float = 0.0
    """Of a step, each perhaps several tiles."""
    step: SeenStep | None = None
    """That is nearest to the mean, in unevenness as well; none where all rows are alike."""
    seen: str = ""
    """What the worst row is the worst of, in words."""
    longest: int = 0
    """Tokens of a row that the data settings allow; 0 where all rows are alike."""

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
        return _summary(prepared_steps(run, run.data), run.data.rows, ())
    return _summary(assumed_steps(run, run.data), run.data.rows, _assumptions(run.data))


def _summary(steps: Sequence[SeenStep], limits: PackLimits, assumptions: tuple[str, ...]) -> Mix:
    rows, _ = Counter(step.packing.rows for step in steps).most_common(1)[0]
    usual = [step for step in steps if step.packing.rows == rows]
    middle = usual[_nearest_step(usual)]
    mean = _mean_row(usual)
    most = max((_most_tiles(step) for step in steps), key=lambda row: (row.tiles, row.length))
    length = _longest(steps, limits)
    return Mix(
        mean=mean,
        worst=_with_more_words(most, length - most.length),
        long=_with_more_words(mean, length - mean.length),
        rows=float(rows),
        tokens=_mean([step.tokens.sum() for step in usual]),
        tiles=_mean([step.tiles.sum() for step in usual]),
        squared_lengths=_mean([(step.tokens.astype(float) ** 2).sum() for step in usual]),
        seeing_tokens=_mean([step.tokens[step.pictures > 0].sum() for step in usual]),
        sizes=tuple((length, tiles) for step in usual for length, tiles in step.sizes.tolist()),
        assumptions=assumptions,
        pictures=_mean([step.pictures.sum() for step in usual]),
        step=middle,
        seen=_seen(len(steps), limits, bool(assumptions)),
        longest=limits.max_tokens,
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _nearest(table: NDArray[np.generic]) -> Ints:
    """[items]: those of [items, kinds] that are the nearest to the mean first."""
    mean = table.mean(0)
    return np.argsort((np.abs(table - mean) / np.maximum(mean, 1)).sum(1), kind="stable")


def _nearest_step(steps: Sequence[SeenStep]) -> int:
    """In what it holds, and in how evenly that is dealt: ranks wait for the slowest in every step."""
    return int(_nearest(np.array([(step.tokens.sum(), step.tiles.sum(), step.unevenness) for step in steps]))[0])


def _mean_row(steps: Sequence[SeenStep]) -> PlannedRow:
    """Of equally many rows each; not an empty one, for it tells nothing of what a token costs."""
    rows = steps[0].packing.rows
    for number in _nearest(np.concatenate([step.sizes for step in steps])).tolist():
        step, row = steps[number // rows], number % rows
        if step.packing.row_tokens[row]:
            return step.row(row)
    raise AssertionError("a step has samples")


def _most_tiles(step: SeenStep) -> PlannedRow:
    lengths, tiles = step.sizes.T
    return step.row(int(np.lexsort((lengths, tiles))[-1]))


def _longest(steps: Sequence[SeenStep], limits: PackLimits) -> int:
    """Tokens of the longest row; and of such as packing may make longer than the mean, so that ranks cost the same."""
    longest = max(int(step.packing.row_lengths.max()) for step in steps)
    if limits.rows_multiple == 1:
        return longest
    mean = max(float(step.packing.row_tokens.mean()) for step in steps)
    whole = -(-int(LONGER * mean) // limits.length_multiple) * limits.length_multiple
    return max(longest, min(whole, limits.max_tokens))


def _seen(steps: int, limits: PackLimits, is_assumed: bool) -> str:
    evened = "" if limits.rows_multiple == 1 else f", or {LONGER:g} times the mean, as evening rows out may make one"
    of_tiles = "nothing limits the tiles of one (data.rows.max_tiles=N would)"
    if limits.max_tiles is not None:
        of_tiles = f"data.rows.max_tiles {limits.max_tiles:,} tiles"
    return (
        f"the worst row has the most tiles and the length of the longest of {steps:,} "
        f"{'assumed steps' if is_assumed else 'steps of the data'}{evened}; data.rows.max_tokens allows "
        f"{limits.max_tokens:,} tokens, {of_tiles}"
    )


def _with_more_words(row: PlannedRow, more: int) -> PlannedRow:
    """With so many more tokens in the last document, padded as before."""
    *first, last = row.documents
    return replace(row, documents=(*first, replace(last, tokens=last.tokens + more)), length=row.length + more)


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
