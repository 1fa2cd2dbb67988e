"""The assignment of least cost between the rows and the columns of a matrix, each used at most once.

Shortest augmenting paths with potentials (Jonker and Volgenant's method), in O(rows^2 x columns).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def assign(cost: NDArray[np.float64]) -> list[tuple[int, int]]:
    """The (row, column) pairs of least total cost, as many as the shorter side has, in the order of the rows."""
    rows, columns = cost.shape
    if rows > columns:
        return sorted((row, column) for column, row in assign(cost.T))
    of_rows, of_columns = np.zeros(rows), np.zeros(columns)  # the potentials
    row_at = np.full(columns, -1)
    for row in range(rows):
        column, came_from = _cheapest_path(cost, row, of_rows, of_columns, row_at)
        while came_from[column] >= 0:  # each column takes the row of the one before it on the way
            row_at[column] = row_at[came_from[column]]
            column = int(came_from[column])
        row_at[column] = row
    return sorted((int(row), column) for column, row in enumerate(row_at) if row >= 0)


def _cheapest_path(
    cost: NDArray[np.float64],
    start: int,
    of_rows: NDArray[np.float64],
    of_columns: NDArray[np.float64],
    row_at: NDArray[np.int64],
) -> tuple[int, NDArray[np.int64]]:
    """A free column that the start row reaches most cheaply, and the column before each on the way; moves potentials.

    `came_from[c]` is the column whose row led to c, or -1 where the start row did.
    """
    columns = cost.shape[1]
    distance = np.full(columns, np.inf)
    came_from = np.full(columns, -1)
    is_done = np.zeros(columns, dtype=bool)
    row, before, so_far = start, -1, 0.0
    while True:
        reduced = so_far + cost[row] - of_rows[row] - of_columns
        is_nearer = ~is_done & (reduced < distance)
        distance[is_nearer], came_from[is_nearer] = reduced[is_nearer], before
        column = int(np.argmin(np.where(is_done, np.inf, distance)))
        so_far = float(distance[column])
        is_done[column] = True
        if row_at[column] < 0:
            break
        row, before = int(row_at[column]), column
    of_rows[start] += so_far
    reached = np.flatnonzero(is_done)
    of_rows[row_at[reached[row_at[reached] >= 0]]] += (so_far - distance[reached])[row_at[reached] >= 0]
    of_columns[reached] -= so_far - distance[reached]
    return column, came_from
