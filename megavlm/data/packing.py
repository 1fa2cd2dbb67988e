"""The samples of a step packed into rows: which, never cut, in how many rows, and which rows a rank reads.

The number of rows is the smallest multiple of `rows_multiple` into which the samples fit. All of them are used: a row
costs what it holds, since a microbatch of packed samples is one row and as long as that row, padded to
`length_multiple`. So more rows than needed cost no padding, only shorter rows; `max_tokens` caps a row, and rows are
about equally long.

Rows are dealt to `rows_multiple` bundles that cost about the same, in each kind of cost. A data-parallel rank takes
whole bundles. So what a row holds depends on the step alone, whatever the ranks.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megavlm.config import Config, require
from megavlm.data.balance import Leveller, deal, shares, totals
from megavlm.data.order import OverLong
from megavlm.errors import DataError, LayoutError
from megavlm.tiles import Ints

LONGER = 1.2
"""A row may be made longer than the mean by this, so that bundles cost the same."""
MOST_FULL = 8
"""Rows without room for a sample that are looked at before packing evenly is given up."""
TARGET = 1.04
"""Bundles that cost up to this many times the mean are even."""
LAST_TARGET = 1.048
"""Only above this are they worth the search through pairs of samples."""
RANK_TARGET = 1.01
"""So are ranks, of several bundles each, up to this."""


@dataclass(frozen=True, kw_only=True)
class PackLimits(Config):
    """How large rows may be, and how many there are."""

    max_tokens: int
    """Tokens of a row at most."""
    max_tiles: int | None = None
    """Tiles of a row at most; none: any number."""
    rows_multiple: int = 64
    """Rows of a step are a multiple of this, which the number of data-parallel ranks must divide."""
    length_multiple: int = 64
    """Rows are padded to a multiple of this, which sequence and context parallelism must divide."""

    def check(self) -> None:
        for field in ("max_tokens", "rows_multiple", "length_multiple"):
            require(getattr(self, field) >= 1, self, field, "is below 1", "use 1 or more")
        require(self.max_tiles is None or self.max_tiles >= 1, self, "max_tiles", "is below 1", "use 1 or more")
        whole = -(-self.max_tokens // self.length_multiple) * self.length_multiple
        problem = f"is no multiple of length_multiple ({self.length_multiple})"
        require(whole == self.max_tokens, self, "max_tokens", problem, f"use {whole}")


class Limited(NamedTuple):
    """Samples held to a limit."""

    tokens: Ints
    """Tokens of each sample that are left."""
    is_cut: NDArray[np.bool_]
    """Whether the last of its text was left out."""
    is_dropped: NDArray[np.bool_]
    """Whether it was left out: it keeps its place in the step, and has no tokens and no weight."""


@dataclass(frozen=True)
class StepPacking:
    """Which row holds each sample of a step."""

    limits: PackLimits
    row_of: Ints
    """[samples]; the samples of a row stand in it in the order of the step."""
    row_tokens: Ints
    """[rows]: tokens without padding. Rows b * n to (b + 1) * n are bundle b, n being rows / rows_multiple."""
    row_costs: Ints
    """[kinds, rows], in units of our own, the kinds in an order of our own."""

    @property
    def rows(self) -> int:
        return len(self.row_tokens)

    @property
    def row_lengths(self) -> Ints:
        """[rows]: tokens with padding; an empty row is as short as rows can be."""
        step = self.limits.length_multiple
        return np.maximum(-(-self.row_tokens // step), 1) * step

    def samples(self, row: int) -> Ints:
        """The samples of a row, in its order."""
        return np.flatnonzero(self.row_of == row)


def apply_limit(tokens: ArrayLike, text_tokens: ArrayLike, limit: int, policy: OverLong) -> Limited:
    """Hold samples to the recipe's limit of tokens each.

    `text_tokens` are those that a cut may take, all but one: a sample that is over-long without them is dropped, for no
    cut goes through an image. Text that stands before an image can't be told from text behind it here, so a sample that
    passes may still prove too long when it is read.
    """
    given, text = np.asarray(tokens, np.int64), np.asarray(text_tokens, np.int64)
    is_long = given > limit
    if policy == "refuse" and is_long.any():
        sample = int(is_long.argmax())
        problem = f"are more than the limit of {limit}"
        remedy = "raise the limit, or let over-long samples be cut or dropped"
        raise DataError(f"tokens of sample {sample} of the step", int(given[sample]), problem, remedy)
    is_cut = is_long & (given - text < limit) & (policy == "cut")
    is_dropped = is_long & ~is_cut
    return Limited(np.where(is_dropped, 0, np.where(is_cut, limit, given)), is_cut, is_dropped)


def pack_step(
    tokens: ArrayLike, tiles: ArrayLike, limits: PackLimits, costs: NDArray[np.generic] | None = None
) -> StepPacking:
    """Pack the samples of one step; `costs` are [kinds, samples], by which rows are evened out: tokens, tiles if none.

    Costs add up: a row costs what its samples do. Give attention's quadratic term with each sample.
    """
    tables = np.stack([np.asarray(tokens, np.int64), np.asarray(tiles, np.int64)])
    given = tables.astype(np.float64) if costs is None else np.asarray(costs)
    assert tables.size == 0 or tables.min() >= 0, "tokens and tiles are counts"
    assert given.shape[1:] == tables.shape[1:], "one cost of each kind a sample"
    assert np.isfinite(given).all() and (given >= 0).all(), "costs are numbers from 0 up"
    sizes, caps = _sizes(tables, limits)
    row_of, rows = _rows(sizes, caps, limits.rows_multiple)
    even = shares(given, limits.rows_multiple)
    row_of = _in_bundles(row_of, rows, even, limits.rows_multiple)
    if limits.rows_multiple > 1 and len(even):
        row_of = _levelled(row_of, rows, sizes, caps, even, limits.rows_multiple)
    return StepPacking(limits, row_of, totals(tables, row_of, rows)[0], totals(even, row_of, rows))


def deal_rows(packing: StepPacking, ranks: int) -> Ints:
    """[ranks, rows of a rank]: which rows each data-parallel rank reads, its longest first."""
    bundles = packing.limits.rows_multiple
    if bundles % ranks:
        problem = f"data-parallel ranks do not divide the rows' multiple of {bundles}"
        raise LayoutError("data-parallel ranks", ranks, problem, f"set rows_multiple to a multiple of {ranks}")
    rank_of = _rank_of(packing.row_costs.reshape(-1, bundles, packing.rows // bundles).sum(2), ranks)
    rows = np.arange(packing.rows).reshape(bundles, -1)
    dealt = rows[np.argsort(rank_of, kind="stable")].reshape(ranks, -1)
    longest_first = np.argsort(-packing.row_tokens[dealt], axis=1, kind="stable")
    return np.take_along_axis(dealt, longest_first, 1)


def _sizes(tables: Ints, limits: PackLimits) -> tuple[Ints, Ints]:
    """(sizes, caps): what is capped of each sample, and of a row."""
    names = ("tokens", "tiles")
    most = (limits.max_tokens, limits.max_tiles)
    for name, table, cap in zip(names, tables, most, strict=True):
        too_large = np.flatnonzero(table > (table if cap is None else cap))
        if too_large.size:
            where, value = f"{name} of sample {too_large[0]} of the step", int(table[too_large[0]])
            remedy = f"raise max_{name}, or hold samples to a limit"
            raise DataError(where, value, f"do not fit a row of {cap} {name}", remedy)
    if limits.max_tiles is None:
        return tables[:1], np.array([limits.max_tokens])
    return tables, np.array([limits.max_tokens, limits.max_tiles])


def _rows(sizes: Ints, caps: Ints, multiple: int) -> tuple[Ints, int]:
    """(row of each sample, rows): evenly filled where that takes no more rows."""
    largest_first = np.argsort(-(sizes / caps[:, None]).max(0), kind="stable")
    least = max(1, *(-(-sizes.sum(1) // caps)).tolist(), *(sizes * 2 > caps[:, None]).sum(1).tolist())
    rows = -(-least // multiple) * multiple
    evenly = _even_fit(sizes, caps, largest_first, rows)
    if evenly is not None:
        return evenly, rows
    tightly = _best_fit(sizes, caps, largest_first)
    rows = -(-(int(tightly.max()) + 1) // multiple) * multiple
    evenly = _even_fit(sizes, caps, largest_first, rows)
    return (tightly if evenly is None else evenly), rows


def _even_fit(sizes: Ints, caps: Ints, order: Ints, rows: int) -> Ints | None:
    """The row of each sample when each takes the emptiest row that has room; None where one has none in MOST_FULL."""
    row_of = np.empty(sizes.shape[1], np.int64)
    room, limits, columns = [caps.tolist() for _ in range(rows)], caps.tolist(), sizes.T.tolist()
    filled = [(0.0, row) for row in range(rows)]
    for sample in order.tolist():
        skipped = []
        while any(map(int.__lt__, room[filled[0][1]], columns[sample])):
            skipped.append(heapq.heappop(filled))
            if not filled or len(skipped) > MOST_FULL:
                return None
        row = heapq.heappop(filled)[1]
        row_of[sample] = row
        room[row] = [free - size for free, size in zip(room[row], columns[sample], strict=True)]
        fullest = max(1 - free / cap for free, cap in zip(room[row], limits, strict=True))
        for entry in (*skipped, (fullest, row)):
            heapq.heappush(filled, entry)
    return row_of


def _best_fit(sizes: Ints, caps: Ints, order: Ints) -> Ints:
    """The row of each sample when each takes the fullest row that has room."""
    samples = sizes.shape[1]
    row_of, used = np.empty(samples, np.int64), 1
    room = np.repeat(caps[:, None], samples + 1, 1)
    for sample in order.tolist():
        left = room[:, : used + 1] - sizes[:, sample, None]
        fullest = np.where((left < 0).any(0), caps[0] + 1, left[0])
        row = int(fullest.argmin())
        room[:, row] -= sizes[:, sample]
        used += row == used
        row_of[sample] = row
    return row_of


def _levelled(row_of: Ints, rows: int, sizes: Ints, caps: Ints, even: Ints, bundles: int) -> Ints:
    """The row of each sample once the bundles cost about the same; about equally long rows first."""
    leveller = Leveller(even, sizes, row_of, rows, bundles)
    longer = np.maximum(totals(sizes, row_of, rows).max(1), (sizes.sum(1) * LONGER / rows).astype(np.int64))
    leveller.run(np.minimum(caps, longer), TARGET)
    leveller.run(caps, LAST_TARGET, with_pairs=True)
    return leveller.row_of


def _rank_of(costs: Ints, ranks: int) -> Ints:
    """The rank of each bundle, equally many to each; costs are [kinds, bundles]."""
    bundles = costs.shape[1]
    even = costs * ranks // bundles
    rank_of = deal(even, ranks)
    if ranks in (1, bundles) or not len(costs):
        return rank_of
    place = np.empty(bundles, np.int64)
    place[np.argsort(rank_of, kind="stable")] = np.arange(bundles)
    one_each = np.ones((1, bundles), np.int64)  # a bundle fills its place, so that bundles are only swapped
    leveller = Leveller(even, one_each, place, bundles, ranks)
    leveller.run(one_each[:, 0], RANK_TARGET)
    return leveller.row_of // (bundles // ranks)


def _in_bundles(row_of: Ints, rows: int, even: Ints, bundles: int) -> Ints:
    """The row of each sample, the rows renumbered so that each bundle's stand together and all cost about the same."""
    bundle_of = deal(totals(even, row_of, rows), bundles)
    number = np.empty(rows, np.int64)
    number[np.argsort(bundle_of, kind="stable")] = np.arange(rows)
    return number[row_of]
