"""Two sides measured in alternation, and a row that exists only where both computed the same.

A shared machine changes its speed within seconds. So the sides take turns, A B A B ..., and the ratio is taken pair
by pair: what slows the machine down slows both halves of a pair. What has no fair other side (seconds of a plan, say)
is a row of figures alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
class Figure:
    """A number that stands by itself."""

    name: str
    unit: str
    median: float
    min: float
    max: float
    target: float | None = None
    """What the median should not pass."""


def figure(name: str, unit: str, readings: Sequence[float], target: float | None = None) -> Figure:
    """The figure that was read so often, at least once."""
    low, middle, high = np.percentile(readings, (0, 50, 100))
    return Figure(name, unit, float(middle), float(low), float(high), target)


def _no_figures() -> Sequence[Figure]:
    return ()


@dataclass(frozen=True)
class Comparison:
    """Ours against theirs, ready to alternate."""

    benchmark: str
    case: str
    """What is computed, in words and sizes."""
    ours: Side
    theirs: Side
    target: float | None
    """The ratio of times, ours to theirs, that should not be passed; None: the ratio is for information."""
    rounds: int
    warmup: int
    """Rounds before those that are timed; their losses are checked as well."""
    tolerance: float = 1e-4
    """How far apart the losses of a round may be, relative."""
    beside: Side | None = None
    """Timed in each round as well, to be printed below the two: a floor, say, that neither can go under."""
    figures: Callable[[], Sequence[Figure]] = _no_figures
    """Asked behind the last round: what was found beside the times."""


@dataclass(frozen=True)
class Measurement:
    """What has no other side, ready to be measured."""

    benchmark: str
    case: str
    """What is measured, in words and sizes."""
    figures: Callable[[], Sequence[Figure]]
    """Measures."""


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
    """What a comparison found: times, ratio and perhaps figures; or a measurement, figures alone."""

    benchmark: str
    case: str
    rounds: int | None = None
    times: dict[str, Times] = field(default_factory=dict)
    """Side -> its times; ours first, theirs second."""
    ratio: Ratio | None = None
    target: float | None = None
    figures: tuple[Figure, ...] = ()


class NoRowError(Exception):
    """Something went wrong that leaves a benchmark without its row; the others go on."""


class DisagreementError(NoRowError):
    """The two sides computed different losses, so their times say nothing."""


class SkippedError(Exception):
    """This machine has not what a benchmark needs, which the message says."""


def timed(work: Callable[[], float]) -> Pass:
    """Run `work`, which returns its loss, and time it."""
    began = time.perf_counter()
    loss = work()
    return Pass(time.perf_counter() - began, loss)


def measure(found: Comparison | Measurement) -> Row:
    """Alternate the sides and sum up; raises DisagreementError instead where a round's losses differ."""
    if isinstance(found, Measurement):
        return Row(found.benchmark, found.case, figures=tuple(found.figures()))
    return _alternate(found)


def _alternate(comparison: Comparison) -> Row:
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
        tuple(comparison.figures()),
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
