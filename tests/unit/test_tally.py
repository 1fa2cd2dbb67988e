"""Counting whole numbers: exact figures, and bars that hold every value once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megavlm.data.tally import LARGEST, MOST_BARS, QUANTILES, Shares, Tally


def tally_of(values: np.ndarray, parts: int = 3) -> Tally:
    tally = Tally()
    for part in np.array_split(values, parts):
        tally.add(part)
    return tally


RNG = np.random.default_rng(0)
VALUES = {
    "even": RNG.integers(700, 900, 1000),
    "outlier": np.append(RNG.integers(700, 900, 1000), 16_384),
    "wide": np.exp(RNG.normal(5, 2, 1000)).astype(np.int64),
    "zeros and few": np.where(RNG.random(1000) < 0.3, 0, RNG.integers(729, 8766, 1000)),
    "small": RNG.integers(0, 5, 1000),
    "one": np.array([7]),
    "all sizes": np.array([0, 1, 2**21, 3, 10]),
    "unsigned": RNG.integers(0, 2**32, 50, dtype=np.uint32),
}


@pytest.mark.parametrize("name", VALUES)
def test_figures_and_bars(name: str) -> None:
    values = VALUES[name].astype(np.int64)
    tally, held = tally_of(VALUES[name]), np.minimum(values, LARGEST)
    assert (tally.count, tally.sum, tally.least, tally.most) == (
        len(values),
        values.sum(),
        held.min(),
        held.max(),
    )
    for share in QUANTILES:
        assert tally.quantile(share) == np.quantile(held, share, method="inverted_cdf")
    bars = tally.bars()
    assert len(bars) <= MOST_BARS + 1
    assert [bar.values for bar in bars] == [((held >= bar.first) & (held <= bar.last)).sum() for bar in bars]
    assert sum(bar.values for bar in bars) == len(values)
    assert all(before.last < after.first for before, after in itertools.pairwise(bars))


def test_bars_spread_what_there_is() -> None:
    """An outlier presses nothing into one bar, and zeros are a case of their own."""
    assert max(bar.values for bar in tally_of(VALUES["outlier"]).bars()) < 400
    bars = tally_of(VALUES["zeros and few"]).bars()
    assert bars[0][:2] == (0, 0) and bars[0].values == (VALUES["zeros and few"] == 0).sum()
    assert bars[1].first >= 512 and len(bars) > 6
    assert Tally().bars() == [] and Tally().quantile(0.5) == 0


def test_shares() -> None:
    shares = Shares((0.5, 1.0), ("low", "middle", "high"))
    for _ in range(2):
        shares.add(np.array([0.1, 0.5, 0.7, 1.0, 9.0]))
    assert shares.counts.tolist() == [2, 4, 4]
