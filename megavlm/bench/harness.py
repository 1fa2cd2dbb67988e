"""Two sides measured in alternation, and a row that exists only where both computed the same.

A shared machine changes its speed within seconds. So the sides take turns, A B A B ..., and the ratio is taken pair
by pair: what slows the machine down slows both halves of a pair.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

THREADS = 2
"""torch's threads in every benchmark, so that rows of machines with more cores can be compared."""


@dataclass(frozen=True)
class Pass:
    """One timed pass of one side, and the loss it computed."""

    seconds: float
    loss: float


@dataclass(frozen=True)
class Side:
    """One of the two programs compared; each call of `run` is the next pass."""

    name: str
    run: Callable[[], Pass]


@dataclass(frozen=True)
class Comparison:
    """Ours against theirs, ready to alternate."""

    benchmark: str
    case: str
    """What is computed, in words and sizes."""
    ours: Side
    theirs: Side
    target: float
    """The ratio of times, ours to theirs, that should not be passed."""
    rounds: int
    warmup: int
    """Rounds before those that are timed; their losses are checked as well."""
    tolerance: float = 1e-4
    """How far apart the losses of a round may be, relative."""
    beside: Side | None = None
    """Timed in each round as well, to be printed below the two: a floor, say, that neither can go under."""


@dataclass(frozen=True)
class Times:
    """Milliseconds a pass."""

    min: float
    median: float
    p80: float


@dataclass(frozen=True)
class Ratio:
    """Ours to theirs, pair by pair: the middle one, and where three fifths of the pairs lie."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Row:
    """What a comparison found."""

    benchmark: str
    case: str
    rounds: int
    times: dict[str, Times]
    """Side -> its times; ours first, theirs second."""
    ratio: Ratio
    target: float


class DisagreementError(Exception):
    """The two sides computed different losses, so their times say nothing."""


def timed(work: Callable[[], float]) -> Pass:
    """Run `work`, which returns its loss, and time it."""
    began = time.perf_counter()
    loss = work()
    return Pass(time.perf_counter() - began, loss)


def measure(comparison: Comparison) -> Row:
    """Alternate the sides and sum up; raises DisagreementError instead where a round's losses differ."""
    sides = [comparison.ours, comparison.theirs, *([comparison.beside] if comparison.beside else [])]
    rounds = []
    for number in range(comparison.warmup + comparison.rounds):
        found = [side.run() for side in sides]
        _check_agreement(comparison, number, *found[:2])
        if number >= comparison.warmup:
            rounds.append([one.seconds for one in found])
    columns = list(zip(*rounds, strict=True))
    ours, theirs = columns[:2]
    return Row(
        comparison.benchmark,
        comparison.case,
        comparison.rounds,
        {side.name: times_of(column) for side, column in zip(sides, columns, strict=True)},
        ratio_of(ours, theirs),
        comparison.target,
    )


def _check_agreement(comparison: Comparison, number: int, ours: Pass, theirs: Pass) -> None:
    # Written so that a loss that is no number counts as a disagreement.
    if not abs(ours.loss - theirs.loss) <= comparison.tolerance * abs(theirs.loss):
        raise DisagreementError(
            f"{comparison.benchmark}: round {number}: loss {ours.loss!r} of {comparison.ours.name}, {theirs.loss!r} of "
            f"{comparison.theirs.name}; they may differ by {comparison.tolerance:g}, relative"
        )


def times_of(seconds: Sequence[float]) -> Times:
    """The times of one side's passes."""
    low, middle, high = np.percentile(seconds, (0, 50, 80)) * 1000
    return Times(float(low), float(middle), float(high))


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio of each pair of passes, then the percentiles: never the ratio of two medians."""
    low, middle, high = np.percentile(np.divide(ours, theirs), (20, 50, 80))
    return Ratio(float(middle), float(low), float(high))
