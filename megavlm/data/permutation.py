"""Shuffles that are formulas: any element of a keyed permutation of 0 .. n-1, and its place, without a table of n.

The numbers are laid out as a grid of about sqrt(n) by sqrt(n), with a few places more than n. A Feistel network over
(row, column) permutes the grid: by turns the row moves by a keyed hash of the column, and the column by one of the row,
each modulo its side. What lands on a place beyond n goes through again until it does not ("cycle walking"), which
leaves a permutation of n; less than one number in sqrt(n) goes through twice. Grids too small for a network to be
random are sorted by their hashes instead, which is a table of at most SMALLEST_NETWORK numbers.
"""

from __future__ import annotations

import hashlib
import json
from math import isqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megavlm.tiles import Ints

Words = NDArray[np.uint64]

SMALLEST_NETWORK = 1_024
ROUNDS = 6
"""Of the network. The statistics that its tests take show 3 rounds, and no longer 4."""
LARGEST = 1 << 60


class KeyedPermutation:
    """A permutation of range(size), as the key picks it; called with places, it gives what stands there."""

    def __init__(self, size: int, *key: int | str) -> None:
        assert 1 <= size <= LARGEST, size
        self.size = int(size)
        digest = hashlib.blake2b(json.dumps([self.size, *key]).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8").reshape(ROUNDS, 1)
        self._rows = isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        self._table = self._small_table() if size <= SMALLEST_NETWORK else None

    def __call__(self, places: ArrayLike) -> Ints:
        """What stands at each place."""
        numbers = self._words(places)
        return numbers if self._table is None else self._table[numbers]

    def inverse(self, elements: ArrayLike) -> Ints:
        """The place at which each element stands."""
        numbers = self._words(elements, is_inverse=True)
        return numbers if self._table is None else np.argsort(self._table, kind="stable")[numbers]

    def _words(self, numbers: ArrayLike, is_inverse: bool = False) -> Ints:
        """The numbers through the network, or as they are where a table serves; in the shape that they came in."""
        given = np.asarray(numbers, np.int64)
        assert given.size == 0 or (given.min() >= 0 and given.max() < self.size), f"outside of range({self.size})"
        if self._table is not None:
            return given
        words = self._pass(given.ravel().astype(np.uint64), is_inverse)
        beyond = np.flatnonzero(words >= self.size)
        while beyond.size:
            words[beyond] = self._pass(words[beyond], is_inverse)
            beyond = beyond[words[beyond] >= self.size]
        return words.astype(np.int64).reshape(given.shape)

    def _pass(self, words: Words, is_inverse: bool) -> Words:
        """Once through the network, within the grid."""
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row, column = words // columns, words % columns
        for turn in reversed(range(ROUNDS)) if is_inverse else range(ROUNDS):
            if turn % 2:
                column = _moved(column, row, self._keys[turn], columns, is_inverse)
            else:
                row = _moved(row, column, self._keys[turn], rows, is_inverse)
        return row * columns + column

    def _small_table(self) -> Ints:
        hashes = mixed(self._keys[0] + np.arange(1, self.size + 1, dtype=np.uint64) * _GOLDEN)
        return np.argsort(hashes, kind="stable")


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(words: Words) -> Words:
    """Each 64-bit word hashed to another one: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _moved(side: Words, other: Words, key: Words, length: np.uint64, is_inverse: bool) -> Words:
    """One coordinate, moved by the hash of the other: of its top 32 bits, scaled to the side's length."""
    by = (mixed(other * _GOLDEN + key) >> np.uint64(32)) * length >> np.uint64(32)
    return (side + (length - by if is_inverse else by)) % length
