"""Blends that are formulas: whose turn each place of a stream is, and how many turns each source has had before it.

Two sources with a and b parts: of the first j places, the first source takes a / (a + b) * j, rounded to whole places.
That is a closed form, as even as whole places can be, and every j can be asked for by itself. More sources are blended
two by two: the two with the least parts become one, until one is left (Huffman's tree), whose places are dealt down to
its halves. After j places a source has had its exact share of j, give or take MOST_ASTRAY; what a level of the tree is
astray reaches the one below it only in part, and in a Huffman tree these parts are at most 1, 2/3, 4/9, ...

All sums are of whole numbers. Weights that are no whole multiples of each other are multiplied until they are; where
that takes more than FINEST, they are rounded to FINEST parts in all: astray by half a sample in a trillion.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from megavlm.tiles import Ints

FINEST = 1 << 40
"""Most parts of a blend in all."""
MOST_ASTRAY = 2
"""Samples by which a source's count may differ from its exact share, at any place and for any number of sources."""
_LOW_BITS = 20


class _Joint(NamedTuple):
    """Where places are dealt to two halves; a half is a joint by its number, or a source as -1 - its number."""

    left: int
    right: int
    left_parts: int
    parts: int


class Blend:
    """Whose turn each place is, for sources that take so many parts each; a period of sum(parts) is exact."""

    def __init__(self, parts: Sequence[int]) -> None:
        assert parts and min(parts) >= 1 and sum(parts) <= FINEST, parts
        self.parts = tuple(parts)
        self._joints = _huffman(self.parts)

    def turns(self, places: ArrayLike) -> tuple[Ints, Ints]:
        """(source, turn) of each place: it holds that source's turn-th sample, from 0."""
        asked = np.asarray(places, np.int64).ravel()
        source, turn = np.empty_like(asked), np.empty_like(asked)
        waiting = [(len(self._joints) - 1 if self._joints else -1, np.arange(asked.size), asked)]
        while waiting:
            node, at, place = waiting.pop()
            if node < 0:
                source[at], turn[at] = -1 - node, place
                continue
            joint = self._joints[node]
            before = _taken(place, joint)
            is_left = _taken(place + 1, joint) > before
            waiting.append((joint.left, at[is_left], before[is_left]))
            waiting.append((joint.right, at[~is_left], (place - before)[~is_left]))
        return source, turn

    def before(self, places: ArrayLike) -> Ints:
        """[sources, places]: turns that each source has had before a place."""
        asked = np.asarray(places, np.int64).ravel()
        counts = np.empty((len(self.parts), asked.size), np.int64)
        waiting = [(len(self._joints) - 1 if self._joints else -1, asked)]
        while waiting:
            node, place = waiting.pop()
            if node < 0:
                counts[-1 - node] = place
                continue
            joint = self._joints[node]
            taken = _taken(place, joint)
            waiting += [(joint.left, taken), (joint.right, place - taken)]
        return counts


def whole_parts(weights: Sequence[float]) -> list[int]:
    """The weights as whole numbers in the same proportion; 0 for one that is too small beside the others.

    A weight counts as its decimals say: 0.1 is a tenth.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    common = lcm(*((weight / total).denominator for weight in exact))
    if common <= FINEST:
        return [int(weight / total * common) for weight in exact]
    parts = [int(weight / total * FINEST) for weight in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: parts[source] - exact[source] / total * FINEST)
    for source in by_remainder[: FINEST - sum(parts)]:
        parts[source] += 1
    return parts


def _huffman(parts: Sequence[int]) -> list[_Joint]:
    """The joints, the root last; of equal parts, the source named first and then the joint made first."""
    heap = [(count, source, -1 - source) for source, count in enumerate(parts)]
    heapq.heapify(heap)
    joints: list[_Joint] = []
    while len(heap) > 1:
        (few, _, left), (many, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        heapq.heappush(heap, (few + many, len(parts) + len(joints), len(joints)))
        joints.append(_Joint(left, right, few, few + many))
    return joints


def _taken(place: Ints, joint: _Joint) -> Ints:
    """How many of the places before this one the left half takes: floor(place * left_parts / parts + 1/2), exactly.

    Within a period the product may pass 64 bits, so it is divided in two steps, as by hand.
    """
    period, rest = np.divmod(place, joint.parts)
    high, low = joint.left_parts >> _LOW_BITS, joint.left_parts & ((1 << _LOW_BITS) - 1)
    quotient, remainder = np.divmod(rest * high, joint.parts)
    last = ((remainder << _LOW_BITS) + rest * low + joint.parts // 2) // joint.parts
    return period * joint.left_parts + (quotient << _LOW_BITS) + last
