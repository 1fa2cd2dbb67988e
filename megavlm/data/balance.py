"""Evens out what bundles of rows cost, by swaps of samples.

In each round every bundle that costs too much, in any kind of cost, looks through its share of the other bundles: at
all swaps of one of its samples, or of none, with one of theirs, or with none, that keep both rows within their caps. It
makes the swap after which the two are least above the target (by the sum of squares of what is above). The shares are
disjoint, so that all these swaps are made at once, and go around from round to round, so that every two bundles meet.

The kinds of cost come in one by one, that of the coarsest samples first, and it weighs more: tiles, few and many to a
sample, are hard to even out, while tokens can still be evened out between samples of equally many tiles. What is above
the target in the end may also swap two samples of one row at once.

Whatever is summed is a whole number, so that every rank of every machine makes the same swaps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megavlm.tiles import Ints

EVEN = 1 << 24
"""What a bundle costs in each kind when all cost the same."""
ROUNDS = 24
"""Most rounds with one set of kinds."""
PAIR_ROUNDS = 20
"""Most rounds in which pairs are swapped."""
WINDOW = 16
"""Most moves of a bundle that one round looks at."""
COARSER = 8
"""What a coarser kind weighs beside the next finer one."""
_NO_WAY = 1 << 60
_RESOLUTION = 1 << 20


def shares(costs: NDArray[np.generic], bundles: int) -> Ints:
    """[kinds, samples]: the costs in units of which a bundle has EVEN on average; kinds that cost nothing are left out.

    The coarsest kind comes first.
    """
    kinds = [kind for kind in costs if kind.size and kind.max() > 0]
    scaled = []
    for kind in kinds:
        whole = np.rint(kind / kind.max() * _RESOLUTION).astype(np.int64)
        scaled.append(whole * (bundles * EVEN) // whole.sum())
    scaled.sort(key=lambda kind: -int(kind.max()))
    return np.array(scaled, np.int64).reshape(len(scaled), costs.shape[1])


def deal(costs: Ints, bundles: int) -> Ints:
    """[items]: the bundle of each item, equally many in each; costs are `shares`, [kinds, items].

    The dearest item first, each to the bundle that is the cheapest with it.
    """
    kinds, items = costs.shape
    assert items % bundles == 0, (items, bundles)
    loads, free = np.zeros((kinds, bundles), np.int64), np.full(bundles, items // bundles)
    bundle_of = np.arange(items) % bundles
    if kinds == 0 or bundles == 1:
        return bundle_of
    for item in np.argsort(-costs.max(0), kind="stable").tolist():
        with_it = loads + costs[:, item, None]
        worst = with_it.max(0)
        worst[free == 0] = _NO_WAY
        bundle = int(worst.argmin())
        loads[:, bundle] = with_it[:, bundle]
        free[bundle] -= 1
        bundle_of[item] = bundle
    return bundle_of


@dataclass(frozen=True)
class _Moves:
    """What a swap may take out of a row: a sample, nothing (once for each row), or two samples at once."""

    costs: Ints
    """[kinds, moves]"""
    sizes: Ints
    """[capped sizes, moves]"""
    row: Ints
    """[moves]: the row that each is taken from."""
    samples: Ints
    """[moves, 2]: the samples in it; -1 where there are fewer."""

    def take(self, at: Ints) -> _Moves:
        return _Moves(self.costs[:, at], self.sizes[:, at], self.row[at], self.samples[at])

    def joined(self, other: _Moves) -> _Moves:
        costs, sizes = np.hstack([self.costs, other.costs]), np.hstack([self.sizes, other.sizes])
        return _Moves(costs, sizes, np.hstack([self.row, other.row]), np.vstack([self.samples, other.samples]))


class Leveller:
    """Samples in rows, the rows in bundles: row r is in bundle r // rows_per_bundle."""

    def __init__(self, costs: Ints, sizes: Ints, row_of: Ints, rows: int, bundles: int) -> None:
        self.row_of = row_of.copy()
        """[samples]"""
        self._costs, self._sizes = (np.pad(table, ((0, 0), (0, 1))) for table in (costs, sizes))
        self._bundles, self._rows, self._rows_per_bundle = bundles, rows, rows // bundles
        self._filled = totals(sizes, row_of, rows)
        self._loads = totals(costs, row_of // self._rows_per_bundle, bundles)
        nobody = np.full(rows + 1, len(row_of))
        self._single = self._moves_of(np.concatenate([np.arange(len(row_of)), nobody]), nobody[:1])
        self._single.sizes[:, -1] = _NO_WAY

    def run(self, caps: Ints, target: float, with_pairs: bool = False) -> None:
        """Swap until no bundle costs more than target times the mean, or nothing more is found."""
        most = int(EVEN * target)
        first = len(self._loads) if with_pairs else 1
        for kinds in range(first, len(self._loads) + 1):
            idle = 0
            for turn in range(PAIR_ROUNDS if with_pairs else ROUNDS):
                worst = self._loads[:kinds].max(0)
                dear = min(int((worst > most).sum()), -(-self._bundles // 4))
                if idle > dear // 2 or dear == 0:
                    break
                by_cost = np.argsort(-worst, kind="stable")
                givers, others = by_cost[:dear], by_cost[dear:]
                share = len(others) // dear
                takers = np.roll(others, turn * share)[: dear * share].reshape(share, dear).T
                swapped = self._round(turn, givers, takers, kinds, most, caps, with_pairs)
                idle = 0 if swapped else idle + 1

    def _round(
        self, turn: int, givers: Ints, takers: Ints, kinds: int, most: int, caps: Ints, with_pairs: bool
    ) -> bool:
        """Make the best swap of each giver [givers] with its takers [givers, share], where any is good."""
        moves = self._moves(with_pairs)
        members = self._members(moves.row // self._rows_per_bundle, turn)
        mine, theirs = members[givers], members[takers].reshape(len(givers), -1)
        taker = np.repeat(takers, members.shape[1], axis=1)
        change = self._change(moves, mine, theirs, givers, taker, kinds, most)
        change[~self._fits(moves, mine, theirs, caps)] = _NO_WAY
        flat = change.reshape(len(givers), -1)
        best = flat.argmin(1)
        is_good = np.flatnonzero(np.take_along_axis(flat, best[:, None], 1)[:, 0] < 0)
        give = mine[is_good, best[is_good] // theirs.shape[1]]
        take = theirs[is_good, best[is_good] % theirs.shape[1]]
        self._exchange(moves.take(give), moves.take(take))
        return is_good.size > 0

    def _moves(self, with_pairs: bool) -> _Moves:
        """What can be swapped; the last one never fits, and fills up tables."""
        row = np.concatenate([self.row_of, np.arange(self._rows), [0]])
        if not with_pairs:
            return replace(self._single, row=row)
        by_row = np.argsort(self.row_of, kind="stable")
        is_pair = np.diff(self.row_of[by_row]) == 0
        before, behind = by_row[:-1][is_pair], by_row[1:][is_pair]
        pairs = replace(self._moves_of(before, behind), row=self.row_of[before])
        return pairs.joined(replace(self._single, row=row))

    def _moves_of(self, first: Ints, second: Ints) -> _Moves:
        """Moves of one sample or two; the number behind the last sample stands for none."""
        samples = np.stack(np.broadcast_arrays(first, second), 1)
        costs, sizes = (table[:, first] + table[:, second] for table in (self._costs, self._sizes))
        return _Moves(costs, sizes, first, np.where(samples == len(self.row_of), -1, samples))

    def _members(self, bundle_of: Ints, turn: int) -> Ints:
        """[bundles, members]: moves of each bundle, WINDOW of them at a time; the last of all moves fills up."""
        by_bundle = np.argsort(bundle_of[:-1], kind="stable")
        counts = np.bincount(bundle_of[:-1], minlength=self._bundles)
        members = min(int(counts.max()), WINDOW)
        place = np.tile(np.arange(members), (self._bundles, 1))
        is_more = counts > members
        place[is_more] = (place[is_more] + turn * members) % counts[is_more, None]
        at = (np.cumsum(counts) - counts)[:, None] + place
        found = by_bundle[np.minimum(at, len(by_bundle) - 1)]
        found[place >= counts[:, None]] = len(bundle_of) - 1
        return found

    def _change(self, moves: _Moves, mine: Ints, theirs: Ints, giver: Ints, taker: Ints, kinds: int, most: int) -> Ints:
        """[givers, mine, theirs]: by how much a swap changes what the two bundles are above the target, squared."""
        change = np.zeros((*mine.shape, theirs.shape[1]), np.int64)
        for costs, loads in zip(moves.costs[:kinds], self._loads[:kinds], strict=True):
            over = loads - most
            squares = np.maximum(over, 0) ** 2
            moved = costs[mine][:, :, None] - costs[theirs][:, None, :]
            left = over[giver][:, None, None] - moved
            moved += over[taker][:, None, :]
            for after in (left, moved):
                np.maximum(after, 0, out=after)
                after *= after
            left += moved
            left -= (squares[giver][:, None] + squares[taker])[:, None, :]
            change = change * COARSER + left
        return change

    def _fits(self, moves: _Moves, mine: Ints, theirs: Ints, caps: Ints) -> NDArray[np.bool_]:
        """[givers, mine, theirs]: whether both rows keep within their caps."""
        fits = np.ones((*mine.shape, theirs.shape[1]), bool)
        for sizes, filled, cap in zip(moves.sizes, self._filled, caps.tolist(), strict=True):
            moved = sizes[mine][:, :, None] - sizes[theirs][:, None, :]
            room = (cap - filled)[moves.row]
            fits &= (moved <= room[theirs][:, None, :]) & (moved >= -room[mine][:, :, None])
        return fits

    def _exchange(self, give: _Moves, take: _Moves) -> None:
        """Swap what was chosen; no bundle stands in two swaps, so no row does."""
        for out, into in ((give, take), (take, give)):
            for column in out.samples.T:
                self.row_of[column[column >= 0]] = into.row[column >= 0]
        costs, sizes = give.costs - take.costs, give.sizes - take.sizes
        for rows, sign in ((give.row, -1), (take.row, 1)):
            self._loads[:, rows // self._rows_per_bundle] += sign * costs
            self._filled[:, rows] += sign * sizes


def totals(table: Ints, group_of: Ints, groups: int) -> Ints:
    """[kinds, groups]: the sums of each group's columns, exact."""
    sums = np.zeros((len(table), groups), np.int64)
    for kind, values in zip(sums, table, strict=True):
        kind[:] = np.bincount(group_of, values, groups)  # in float64, which holds sums below 2**53
    return sums
