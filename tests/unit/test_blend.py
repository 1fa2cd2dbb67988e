"""Blends: every source has its share at every place of the stream, and the two ways to ask agree."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from megavlm.data.blend import FINEST, MOST_ASTRAY, Blend, whole_parts

TRILLION = 10**12


def random_parts(draw: np.random.Generator) -> list[int]:
    """Of up to 60 sources, alike or of sizes that differ by many powers of ten."""
    spread = draw.choice([0.1, 1.0, 4.0])
    return [max(1, int(size)) for size in 1_000 * np.exp(spread * draw.standard_normal(draw.integers(1, 61)))]


@pytest.mark.parametrize("seed", range(8))
def test_shares_hold_at_every_place(seed: int) -> None:
    draw = np.random.default_rng(seed)
    for _ in range(10):
        parts = random_parts(draw)
        places = np.concatenate([np.arange(100), draw.integers(0, TRILLION, 100), [sum(parts), TRILLION]])
        counts = Blend(parts).before(places)
        np.testing.assert_array_equal(counts.sum(0), places)
        most = 0.5 if len(parts) == 2 else 1 if len(parts) == 3 else MOST_ASTRAY
        for part, count in zip(parts, counts.tolist(), strict=True):
            for place, turns in zip(places.tolist(), count, strict=True):
                assert abs(Fraction(part * place, sum(parts)) - turns) <= most


def test_a_period_is_exact() -> None:
    parts = [538_123_457, 238_000_001, 20, 1, 115_000_000]
    blend = Blend(parts)
    for periods in (1, 2, 1_000):
        np.testing.assert_array_equal(blend.before([periods * sum(parts)])[:, 0], np.array(parts) * periods)


def test_turns_count_up_without_a_gap() -> None:
    draw = np.random.default_rng(3)
    for first in (0, 12_345, TRILLION):
        parts = random_parts(draw)
        blend = Blend(parts)
        source, turn = blend.turns(np.arange(first, first + 3_000))
        for number, before in enumerate(blend.before([first])[:, 0]):
            mine = turn[source == number]
            np.testing.assert_array_equal(mine, np.arange(before, before + len(mine)))


def test_each_place_can_be_asked_for_alone() -> None:
    blend = Blend([5, 3, 3, 1])
    source, turn = blend.turns(np.arange(500))
    shuffled = np.random.default_rng(0).permutation(500)
    assert all(
        (blend.turns([place])[0][0], blend.turns([place])[1][0]) == (source[place], turn[place]) for place in range(40)
    )
    np.testing.assert_array_equal(blend.turns(shuffled)[1], turn[shuffled])


def test_the_finest_blend_does_not_overflow() -> None:
    parts = [FINEST // 2 - 1, FINEST // 2 + 1]
    places = np.random.default_rng(0).integers(0, 1 << 61, 200)
    for place, count in zip(places.tolist(), Blend(parts).before(places)[0].tolist(), strict=True):
        assert abs(Fraction(parts[0] * place, FINEST) - count) <= Fraction(1, 2)


def test_weights_become_whole_numbers() -> None:
    assert whole_parts([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert whole_parts([101.0, 53.0]) == [101, 53]
    assert whole_parts([1e-7, 1.0]) == [1, 10_000_000]
    weights = np.random.default_rng(0).random(20).tolist()
    parts = whole_parts(weights)
    assert sum(parts) == FINEST
    for part, weight in zip(parts, weights, strict=True):
        assert abs(Fraction(part, FINEST) - Fraction(str(weight)) / sum(map(Fraction, map(str, weights)))) <= Fraction(
            1, FINEST
        )
