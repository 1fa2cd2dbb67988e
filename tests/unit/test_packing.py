"""Packing a step: whole samples under the caps, how many rows, how much padding, and that ranks cost the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mixtures import Batch, draw_batch

from megavlm.data.balance import Leveller, deal, shares, totals
from megavlm.data.packing import PackLimits, StepPacking, apply_limit, deal_rows, pack_step
from megavlm.errors import ConfigError, DataError, LayoutError, MegavlmError
from megavlm.tiles import STAGE_GRIDS, Ints

BATCH = 512
LONG, SHORT = 12_288, 4_096
"""Row lengths of Aquila-VL: that of its released settings, and one that a single A100 takes."""


def stage_batch(stage: str, seed: int, max_tokens: int) -> Batch:
    batch = draw_batch(STAGE_GRIDS[stage], BATCH, seed)
    limited = apply_limit(batch.tokens, batch.text_tokens, max_tokens, "cut")
    assert not limited.is_dropped.any()
    return batch._replace(tokens=limited.tokens)


def pack(batch: Batch, max_tokens: int, **limits: int) -> StepPacking:
    return pack_step(batch.tokens, batch.tiles, PackLimits(max_tokens=max_tokens, **limits), batch.flops())


def imbalance(costs: Any, group_of: Ints, groups: int) -> float:
    sums = np.bincount(group_of, costs, groups)
    return float(sums.max() / sums.mean())


def least_rows(sizes: Ints, cap: int) -> int:
    """The bound L2 of Martello and Toth (Knapsack Problems, 1990, section 8.3): no packing has fewer rows.

    For each size `small`: samples beside which not even that fits have a row each, as have the others above half a row;
    those from `small` up to half a row may fill what the latter leave free, the rest needs rows of its own.
    """
    best = 0
    for small in np.unique(np.append(sizes[sizes * 2 <= cap], 0)):
        alone, large = sizes > cap - small, (sizes * 2 > cap) & (sizes <= cap - small)
        medium = (sizes >= small) & (sizes * 2 <= cap)
        free = large.sum() * cap - sizes[large].sum()
        best = max(best, alone.sum() + large.sum() + max(0, -(-(sizes[medium].sum() - free) // cap)))
    return int(best)


def test_random_steps_keep_all_rules() -> None:
    draw = np.random.default_rng(0)
    for _ in range(150):
        samples, cap, multiple = int(draw.integers(0, 200)), int(draw.integers(1, 30)) * 8, int(draw.integers(1, 17))
        tokens, tiles = draw.integers(0, cap + 1, samples), draw.integers(0, 8, samples)
        max_tiles = None if draw.random() < 0.5 else int(draw.integers(7, 30))
        limits = PackLimits(max_tokens=cap, max_tiles=max_tiles, rows_multiple=multiple, length_multiple=8)
        costs = draw.random((int(draw.integers(0, 4)), samples)) * 1e12 if draw.random() < 0.5 else None
        packing = pack_step(tokens, tiles, limits, costs)
        assert packing.rows % multiple == 0 and packing.rows > 0
        np.testing.assert_array_equal(np.bincount(packing.row_of, tokens, packing.rows), packing.row_tokens)
        assert packing.row_tokens.max() <= cap
        assert max_tiles is None or np.bincount(packing.row_of, tiles, packing.rows).max() <= max_tiles
        assert (packing.row_lengths >= np.maximum(packing.row_tokens, 1)).all() and packing.row_lengths.max() <= cap
        assert (packing.row_lengths % 8 == 0).all() and (packing.row_lengths - packing.row_tokens <= 8).all()
        found = np.concatenate([packing.samples(row) for row in range(packing.rows)])
        np.testing.assert_array_equal(np.sort(found), np.arange(samples))
        for ranks in (ranks for ranks in range(1, multiple + 1) if multiple % ranks == 0):
            dealt = deal_rows(packing, ranks)
            assert dealt.shape == (ranks, packing.rows // ranks)
            np.testing.assert_array_equal(np.sort(dealt, axis=None), np.arange(packing.rows))
            assert (np.diff(packing.row_tokens[dealt], axis=1) <= 0).all()
        again = pack_step(tokens.copy(), tiles.copy(), limits, costs)
        np.testing.assert_array_equal(again.row_of, packing.row_of)


@pytest.mark.parametrize("stage, max_tokens", [("3", LONG), ("2a", SHORT)])
def test_rows_are_few(stage: str, max_tokens: int) -> None:
    for seed in range(10):
        batch = stage_batch(stage, seed, max_tokens)
        rows, least = pack(batch, max_tokens, rows_multiple=1).rows, least_rows(batch.tokens, max_tokens)
        assert least <= rows <= 1.02 * least
        assert pack(batch, max_tokens).rows <= -(-rows // 64) * 64


def test_computed_tokens_are_real() -> None:
    """With the default multiple of rows, whose rows are as long as they need to be; and in full rows, without it."""
    for seed in range(10):
        batch = stage_batch("3", seed, LONG)
        packing = pack(batch, LONG)
        assert batch.tokens.sum() >= 0.97 * packing.row_lengths.sum()
        assert batch.tokens.sum() >= 0.97 * LONG * pack(batch, LONG, rows_multiple=1).rows


@pytest.mark.parametrize("stage, max_tokens", [("3", LONG), ("2a", SHORT)])
def test_ranks_cost_the_same(stage: str, max_tokens: int) -> None:
    for seed in range(12):
        batch = stage_batch(stage, seed, max_tokens)
        packing = pack(batch, max_tokens)
        for ranks, most in ((2, 1.03), (8, 1.03), (64, 1.05)):
            rank_of_row = np.empty(packing.rows, np.int64)
            rank_of_row[deal_rows(packing, ranks)] = np.arange(ranks)[:, None]
            rank_of = rank_of_row[packing.row_of]
            decoder, tower = batch.flops()
            assert imbalance(decoder, rank_of, ranks) <= most
            assert imbalance(decoder + tower, rank_of, ranks) <= most
            # Tiles are whole: 23.4 on average may leave no other way than 25 on one rank.
            whole = np.ceil(batch.tiles.sum() / ranks) + 1
            assert imbalance(tower, rank_of, ranks) <= max(most, whole * ranks / batch.tiles.sum())


def test_ranks_change_who_reads_a_row_and_nothing_else() -> None:
    packing = pack(stage_batch("3", 5, LONG), LONG)
    rows_of = {ranks: [set(rows) for rows in deal_rows(packing, ranks).tolist()] for ranks in (1, 2, 4)}
    for rows in rows_of.values():
        assert set().union(*rows) == set(range(packing.rows)) and len({len(of) for of in rows}) == 1
    assert rows_of[2] != rows_of[1]


def test_costs_decide_what_is_even() -> None:
    """Samples of one length and unlike costs: rows are even in the costs that are given."""
    draw = np.random.default_rng(0)
    costs = draw.exponential(size=(1, BATCH))
    packing = pack_step(np.full(BATCH, 100), np.zeros(BATCH, int), PackLimits(max_tokens=1_024, rows_multiple=8), costs)
    assert imbalance(costs[0], packing.row_of // (packing.rows // 8), 8) < 1.04


@pytest.mark.parametrize("room, loads", [(5, [8, 8]), (4, [10, 6])])
def test_swaps_keep_within_caps(room: int, loads: list[int]) -> None:
    """Two rows, each its own bundle: 5 for 3 evens them out, but makes one of the rows longer."""
    costs = np.array([[5, 5, 3, 3]])
    leveller = Leveller(shares(costs, 2), np.array([[2, 2, 3, 1]]), np.array([0, 0, 1, 1]), rows=2, bundles=2)
    leveller.run(np.array([room]), target=1.0)
    assert np.bincount(leveller.row_of, costs[0]).tolist() == loads


def test_pairs_are_swapped_where_one_sample_cannot_help() -> None:
    """Two bundles of two rows: 6 and 6, and twice 3 with 2. Only 6 for 3 and 2 at once evens them out."""
    costs = np.array([[6, 6, 3, 2, 3, 2]])
    row_of = np.array([0, 1, 2, 2, 3, 3])
    leveller = Leveller(shares(costs, 2), np.ones((1, 6), np.int64), row_of, rows=4, bundles=2)
    for with_pairs, loads in ((False, [12, 10]), (True, [11, 11])):
        leveller.run(np.array([3]), 1.0, with_pairs)
        assert np.bincount(leveller.row_of // 2, costs[0]).tolist() == loads


def test_deal_gives_equally_many() -> None:
    costs = shares(np.random.default_rng(0).exponential(size=(2, 96)), 8)
    bundle_of = deal(costs, 8)
    assert np.bincount(bundle_of).tolist() == [12] * 8
    loads = totals(costs, bundle_of, 8)
    assert (loads.max(1) < 1.1 * loads.mean(1)).all()


def test_limits_are_applied_by_policy() -> None:
    tokens, text = [10, 32, 33, 90, 60], [10, 30, 12, 90, 20]
    cut = apply_limit(tokens, text, 32, "cut")
    assert cut.tokens.tolist() == [10, 32, 32, 32, 0]
    assert cut.is_cut.tolist() == [False, False, True, True, False]
    assert cut.is_dropped.tolist() == [False, False, False, False, True], "40 tokens before the last image's end"
    drop = apply_limit(tokens, text, 32, "drop")
    assert drop.tokens.tolist() == [10, 32, 0, 0, 0] and not drop.is_cut.any()
    assert apply_limit(tokens, text, 90, "refuse").tokens.tolist() == tokens
    with pytest.raises(DataError, match="tokens of sample 2 of the step = 33: are more than the limit of 32"):
        apply_limit(tokens, text, 32, "refuse")


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: PackLimits(max_tokens=100), ConfigError, "use 128"),
        (lambda: PackLimits(max_tokens=128, rows_multiple=0), ConfigError, "rows_multiple"),
        (lambda: PackLimits(max_tokens=128, max_tiles=0), ConfigError, "max_tiles"),
        (lambda: pack_step([5, 129], [0, 0], PackLimits(max_tokens=128)), DataError, "sample 1 .* row of 128"),
        (lambda: pack_step([5], [9], PackLimits(max_tokens=64, max_tiles=8)), DataError, "8 tiles; raise max_tiles"),
        (lambda: deal_rows(pack_step([5], [0], PackLimits(max_tokens=64)), 40), LayoutError, "ranks = 40"),
    ],
)  # fmt: skip
def test_mistakes_are_named(make: Any, error: type[MegavlmError], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
