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


class TimedWork(NamedTuple):
    """What an operation cost, and how long it took."""

    kind: Kind
    flops: float
    bytes: float
    made: float
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
    allocated: float
    """Bytes a second of new tensors, given by the system and taken back."""
    start: float
    """Seconds that an operation takes whatever its size."""


def fitted(large: Sequence[Timing], small: Timing) -> MachineTimes:
    """From steps of a decoder, the longest rows last, and of one whose arithmetic takes next to no time.

    Slopes come from single operations. What a step takes between them is what new tensors cost when they are given
    back, and the rest of what an operation takes whatever its size: the small decoder tells them apart. In the end all
    slopes are drawn out alike, until the large decoder's longest step comes out as it was.
    """
    every = list(chain(*(one.works for one in large)))
    # Of memory operations the second column is what they allocate.
    made, memory = _slopes([(work.made, work.bytes, work.seconds) for work in every if work.kind == "memory"])
    attended = [(w.flops, 0.0, w.seconds - memory * w.bytes - made * w.made) for w in every if w.kind == "attention"]
    product = _slopes([(w.flops, w.bytes, w.seconds - made * w.made) for w in every if w.kind == "matmul"])
    given_back = _between(large, small)
    per_byte: dict[Kind, float] = {"matmul": product[1], "attention": memory, "memory": memory}
    per_flop: dict[Kind, float] = {"matmul": product[0], "attention": _slopes(attended)[0], "memory": 0.0}

    def grown(timing: Timing) -> float:
        """Seconds of a step's operations beyond their starts."""
        return sum(
            per_flop[work.kind] * work.flops + per_byte[work.kind] * work.bytes + (made + given_back) * work.made
            for work in timing.works
        )

    whole, drawn, start = large[-1], 1.0, 0.0
    for _ in range(REPEATS):
        start = max(small.seconds - drawn * grown(small), 0.0) / len(small.works)
        drawn = max(whole.seconds - start * len(whole.works), LEAST) / max(grown(whole), LEAST)
    return MachineTimes(
        matmul=_rate(drawn * per_flop["matmul"]),
        attention=_rate(drawn * per_flop["attention"]),
        memory=_rate(drawn * memory),
        operands=_rate(drawn * per_byte["matmul"]),
        allocated=_rate(drawn * (made + given_back)),
        start=start,
    )


def _between(large: Sequence[Timing], small: Timing) -> float:
    """Seconds a byte of new tensors, of what steps take between their operations beyond what the small one does."""
    usual = (small.seconds - sum(work.seconds for work in small.works)) / len(small.works)
    left = np.array([t.seconds - sum(work.seconds + usual for work in t.works) for t in large])
    made = np.array([sum(work.made for work in t.works) for t in large])
    return max(float(left @ made / max(made @ made, LEAST)), 0.0)


def _rate(seconds: float) -> float:
    return 1 / max(seconds, LEAST**2)


def _slopes(works: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Seconds of each further unit of work, of two sorts, from operations that took so long.

    The fit adds up to what was measured: noise is thought to be in proportion to time.
    """
    first, second, taken = np.array(works).T
    table = np.stack([np.ones_like(first), first, second], axis=1)
    seconds = np.maximum(taken, LEAST)
    scale = np.maximum(table.max(0), 1.0)
    weights = 1 / np.sqrt(seconds)
    found = np.zeros(3)
    for _ in range(REPEATS):
        found = _least_squares(table / scale * weights[:, None], seconds * weights)
        weights = 1 / np.sqrt(np.maximum(table / scale @ found, LEAST))
    return float(found[1] / scale[1]), float(found[2] / scale[2])


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
