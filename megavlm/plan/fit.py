"""What a machine takes for a unit of work, out of the times of operations.

An operation is thought to take start + flops / rate + bytes / bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megavlm.plan.profile import Kind

REPEATS = 30
LEAST = 1e-9
"""Of anything that is divided by."""
KINDS: tuple[Kind, ...] = ("matmul", "attention", "memory")


class TimedWork(NamedTuple):
    """What an operation cost, and how long it took."""

    kind: Kind
    flops: float
    bytes: float
    seconds: float


class Timing(NamedTuple):
    """A step: as a whole, and its operations."""

    seconds: float
    works: Sequence[TimedWork]


class MachineTimes(NamedTuple):
    """What a machine reaches."""

    matmul: float
    """Floating-point operations a second of products, beside what their operands take."""
    attention: float
    memory: float
    """Bytes a second of all that is no product."""
    operands: float
    """Bytes a second of products' operands and results."""
    start: float
    """Seconds that an operation takes whatever its size."""


def fitted(large: Sequence[Timing], small: Timing) -> MachineTimes:
    """From steps of a decoder, the longest rows last, and of one whose arithmetic takes next to no time.

    Slopes come from single operations, the start from the small decoder's whole steps, since most of it lies between
    operations. Then all slopes are drawn out alike, until the large decoder's whole step comes out as it was.
    """
    works = {kind: [work for work in chain(*(one.works for one in large)) if work.kind == kind] for kind in KINDS}
    per_byte = _slopes([work._replace(flops=0.0) for work in works["memory"]]).per_byte
    product = _slopes(works["matmul"])
    attended = [
        work._replace(seconds=max(work.seconds - per_byte * work.bytes, LEAST), bytes=0.0)
        for work in works["attention"]
    ]
    slopes: dict[Kind, Slopes] = {
        "matmul": product,
        "attention": Slopes(_slopes(attended).per_flop, per_byte),
        "memory": Slopes(0.0, per_byte),
    }
    whole, drawn, start = large[-1], 1.0, 0.0
    for _ in range(REPEATS):
        start = max(small.seconds - drawn * _grown(small, slopes), 0.0) / len(small.works)
        drawn = max(whole.seconds - start * len(whole.works), LEAST) / max(_grown(whole, slopes), LEAST)
    return MachineTimes(
        matmul=_rate(drawn * product.per_flop),
        attention=_rate(drawn * slopes["attention"].per_flop),
        memory=_rate(drawn * per_byte),
        operands=_rate(drawn * product.per_byte),
        start=start,
    )


class Slopes(NamedTuple):
    """Seconds of each further unit of work."""

    per_flop: float
    per_byte: float


def _grown(timing: Timing, slopes: dict[Kind, Slopes]) -> float:
    """Seconds of a step's operations beyond their starts."""
    return sum(
        slopes[work.kind].per_flop * work.flops + slopes[work.kind].per_byte * work.bytes for work in timing.works
    )


def _rate(seconds: float) -> float:
    return 1 / max(seconds, LEAST**2)


def _slopes(works: Sequence[TimedWork]) -> Slopes:
    """Of operations of one kind. The fit adds up to what was measured: noise is thought to be in proportion to time."""
    table = np.array([[1.0, work.flops, work.bytes] for work in works])
    seconds = np.array([work.seconds for work in works])
    scale = np.maximum(table.max(0), 1.0)
    weights = 1 / np.sqrt(seconds)
    found = np.zeros(3)
    for _ in range(REPEATS):
        found = _least_squares(table / scale * weights[:, None], seconds * weights)
        weights = 1 / np.sqrt(np.maximum(table / scale @ found, LEAST))
    return Slopes(*(found / scale)[1:].tolist())


def _least_squares(table: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The best solution without a negative coefficient: that of some of the columns."""
    best, least = np.zeros(table.shape[1]), float((values**2).sum())
    for size in range(1, table.shape[1] + 1):
        for some in map(list, combinations(range(table.shape[1]), size)):
            answer = np.linalg.lstsq(table[:, some], values, rcond=None)[0]
            left = float(((values - table[:, some] @ answer) ** 2).sum())
            if answer.min() >= 0 and left < least:
                best, least = np.zeros(table.shape[1]), left
                best[some] = answer
    return best
