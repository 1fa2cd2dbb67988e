"""Keyed permutations: that they are permutations, that they can be undone, and that they look like chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megavlm.data.permutation import LARGEST, SMALLEST_NETWORK, KeyedPermutation

SIZES = [1, 2, 3, 7, 100, SMALLEST_NETWORK, SMALLEST_NETWORK + 1, 1_600, 1_601, 65_537, 300_000]
NETWORK = SMALLEST_NETWORK + 1
"""The smallest grid that a network has to be random on, and so the hardest."""


def chi_square(counts: NDArray[Any], odds: NDArray[Any] | None = None) -> float:
    """How many standard deviations the counts lie from chance; cases are equally likely, or as the odds say."""
    shares = np.ones(counts.shape) if odds is None else odds
    expected, freedom = shares * (counts.sum() / shares.sum()), counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("size", SIZES)
def test_every_element_has_one_place(size: int) -> None:
    for key in range(3):
        permutation = KeyedPermutation(size, key, "source", 0)
        elements = permutation(np.arange(size))
        np.testing.assert_array_equal(np.sort(elements), np.arange(size))
        np.testing.assert_array_equal(permutation.inverse(elements), np.arange(size))


def test_places_beyond_any_table_can_be_undone() -> None:
    draw = np.random.default_rng(1)
    for size in (700_000_000, 10**12, LARGEST):
        places = draw.integers(0, size, (4, 500))
        permutation = KeyedPermutation(size, 7)
        elements = permutation(places)
        assert elements.min() >= 0 and elements.max() < size
        np.testing.assert_array_equal(permutation.inverse(elements), places)


@pytest.mark.parametrize("size", [6, NETWORK])
def test_an_element_is_anywhere_equally_often(size: int) -> None:
    keys = 3_000
    places = np.array([KeyedPermutation(size, key, "uniform").inverse([0, size // 2, size - 1]) for key in range(keys)])
    bins = min(size, 50)
    for element in places.T:
        odds = np.bincount(np.arange(size) * bins // size)
        assert abs(chi_square(np.bincount(element * bins // size, minlength=bins), odds)) < 5


def test_all_orders_of_four_occur_equally_often() -> None:
    orders = np.array([KeyedPermutation(4, key)(np.arange(4)) for key in range(4_800)])
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert counts.size == 24 and abs(chi_square(counts)) < 5


@pytest.mark.parametrize("size", [SMALLEST_NETWORK, NETWORK, 99_991])
def test_neighbours_have_nothing_to_do_with_each_other(size: int) -> None:
    counts, steps = np.zeros((16, 16)), np.zeros(100)
    for key in range(max(1, 100_000 // size)):
        elements = KeyedPermutation(size, key, "pairs")(np.arange(size))
        bins = elements * 16 // size
        np.add.at(counts, (bins[:-1], bins[1:]), 1)
        steps += np.bincount((np.diff(elements) % size - 1) * 100 // (size - 1), minlength=100)
    odds = np.bincount(np.arange(size - 1) * 100 // (size - 1))
    assert abs(chi_square(counts)) < 5 and abs(chi_square(steps, odds)) < 5


def test_keys_are_independent() -> None:
    """Two shuffles agree at one place on average, whichever part of their keys differs; so do a shuffle and no one."""
    size, rounds = 2_000, 200
    places = np.arange(size)
    for other in ((9, "a", 0), (0, "b", 0), (0, "a", 1), None):
        agreements = 0
        for turn in range(rounds):
            second = places if other is None else KeyedPermutation(size, turn, *other)(places)
            agreements += int((KeyedPermutation(size, turn, 0, "a", 0)(places) == second).sum())
        assert abs(agreements - rounds) < 5 * np.sqrt(rounds), other


def test_another_size_is_another_shuffle() -> None:
    short, long = (KeyedPermutation(size, 0)(np.arange(5_000)) for size in (5_000, 5_001))
    assert (short == long).sum() < 20
