"""How often each whole number came: exact sums and quantiles of any number of values in little memory, and bars."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LARGEST = 2**22
"""Larger values count as this one, save in the sum."""
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MOST_BARS = 16
WIDE = 8
"""Values whose 99th percentile is so many times the first are shown on a scale of doublings."""


class Bar(NamedTuple):
    """The values from `first` to `last`."""

    first: int
    last: int
    values: int
    """How many."""


class Tally:
    """Whole numbers from 0 on, counted."""

    def __init__(self) -> None:
        self._counts = np.zeros(0, np.int64)
        self.sum = 0

    def add(self, values: NDArray[Any]) -> None:
        """Count these values."""
        numbers = np.asarray(values).astype(np.int64)
        assert not numbers.size or numbers.min() >= 0, "no negative numbers"
        self.sum += int(numbers.sum())
        counts = np.bincount(np.minimum(numbers, LARGEST), minlength=len(self._counts))
        counts[: len(self._counts)] += self._counts
        self._counts = counts

    @property
    def count(self) -> int:
        """How many values."""
        return int(self._counts.sum())

    @property
    def mean(self) -> float:
        return self.sum / max(1, self.count)

    @property
    def least(self) -> int:
        return int(np.flatnonzero(self._counts)[0]) if self.count else 0

    @property
    def most(self) -> int:
        return int(np.flatnonzero(self._counts)[-1]) if self.count else 0

    def quantile(self, share: float) -> int:
        """The least value that so large a share of all does not exceed."""
        rank = max(1, int(np.ceil(share * self.count)))
        return int(np.searchsorted(np.cumsum(self._counts), rank)) if self.count else 0

    def between(self, first: int, last: int) -> int:
        """How many values from the first to the last one."""
        return int(self._counts[first : last + 1].sum())

    def bars(self, most_bars: int = MOST_BARS) -> list[Bar]:
        """All values, in at most so many bars of round numbers; those without any that stand together are one."""
        if not self.count:
            return []
        others = self._positive()
        if self.least == 0 and others.least > 1:  # none at all is a case of its own
            return [Bar(0, 0, self.between(0, 0)), *others.bars(most_bars - 1)]
        starts = self._starts(most_bars)
        ends = [*(start - 1 for start in starts[1:]), max(self.most, starts[-1])]
        found: list[Bar] = []
        for bar in (Bar(start, end, self.between(start, end)) for start, end in zip(starts, ends, strict=True)):
            if found and not bar.values and not found[-1].values:
                bar = Bar(found.pop().first, bar.last, 0)
            found.append(bar)
        return found

    def _positive(self) -> Tally:
        """The values above 0."""
        found = Tally()
        found._counts = self._counts.copy()
        found._counts[:1] = 0
        return found

    def _starts(self, most_bars: int) -> list[int]:
        low, high = self.least, self.most
        if high - low < most_bars:
            return list(range(low, high + 1))
        if self.quantile(0.99) > WIDE * max(1, self.quantile(0.01)):
            for scale in ((1.0, 1.25, 1.5, 1.75), (1.0, 1.5), (1.0,)):
                starts = _covering(_doublings(scale), low, high)
                if len(starts) <= most_bars:
                    return starts
            return [starts[0], *starts[1 - most_bars :]]
        # An outlier must not press all others into one bar: what lies beyond belongs to the last.
        top = min(high, max(self.quantile(0.99), low + 1))
        step = _round_up((top - low + 1) / (most_bars - 1))
        return list(range(low // step * step, top + 1, step))


@dataclass
class Shares:
    """Values in bars with fixed limits."""

    limits: Sequence[float]
    """Ascending: bar i has what is from limits[i - 1] to below limits[i]."""
    names: Sequence[str]
    """One for each bar, one more than limits."""

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.limits) + 1
        self.counts = np.zeros(len(self.names), np.int64)

    def add(self, values: NDArray[np.float64]) -> None:
        """Count these values."""
        places = np.searchsorted(self.limits, values, side="right")
        self.counts += np.bincount(places, minlength=len(self.counts))


def _doublings(parts: Sequence[float]) -> list[int]:
    """0 and the powers of two, each cut in these parts."""
    values = {int(2**power * part) for power in range(23) for part in parts if (2**power * part).is_integer()}
    return [0, *sorted(values)]


def _covering(starts: Sequence[int], low: int, high: int) -> list[int]:
    """Those among the starts that bars from low to high need."""
    return list(starts[bisect_right(starts, low) - 1 : bisect_right(starts, high)])


def _round_up(step: float) -> int:
    """1, 2 or 5 times a power of ten, at least the step."""
    power = 1
    while True:
        for part in (1, 2, 5):
            if part * power >= step:
                return part * power
        power *= 10
