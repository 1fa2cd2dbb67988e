"""The loss curve for terminals."""

from __future__ import annotations

import math

import pytest

from megavlm.train.curve import loss_curve


def dots(plot: str) -> set[tuple[int, int]]:
    """(column, row) of all dots, from the top left."""
    bits = {0: (0, 0), 1: (0, 1), 2: (0, 2), 3: (1, 0), 4: (1, 1), 5: (1, 2), 6: (0, 3), 7: (1, 3)}
    found = set()
    for line, text in enumerate(plot.split("\n")[:-2]):
        for column, character in enumerate(text.partition("┤")[2]):
            code = ord(character) - 0x2800
            found |= {(2 * column + x, 4 * line + y) for bit, (x, y) in bits.items() if code >> bit & 1}
    return found


def test_a_straight_line_is_straight() -> None:
    plot = loss_curve([8.0 - step for step in range(8)], width=4, height=2)
    assert dots(plot) == {(0, 0)} | {(step, row) for step in range(1, 8) for row in (step - 1, step)}
    lines = plot.split("\n")
    assert [line.partition("┤")[0] for line in lines[:2]] == ["8 ", "1 "]
    assert lines[2:] == ["  └────", "   1  8"]


def test_many_losses_are_means_of_their_columns() -> None:
    up_and_down = [3.0, 1.0] * 50 + [5.0, 7.0] * 50
    assert dots(loss_curve(up_and_down, width=2, height=2)) == {
        *((x, 7) for x in (0, 1)),
        *((2, y) for y in range(8)),
        (3, 0),
    }


def test_losses_that_are_not_finite_leave_gaps() -> None:
    found = dots(loss_curve([1.0, math.nan, math.inf, 2.0], width=2, height=1))
    assert found == {(0, 3), (3, 0)}


@pytest.mark.parametrize("losses", [[], [math.nan]])
def test_nothing_to_draw_is_said(losses: list[float]) -> None:
    assert loss_curve(losses) == "no finite loss"


@pytest.mark.parametrize("count", [1, 2, 3, 59, 120, 121, 5000])
def test_it_fits_whatever_the_number_of_losses(count: int) -> None:
    plot = loss_curve([2.5 + math.exp(-step / 50) for step in range(count)], width=60, height=8)
    lines = plot.split("\n")
    assert len(lines) == 10
    assert max(map(len, lines)) <= 60 + len("3.5 ┤") + 1
    assert f"{count:,}" in lines[-1]


def test_a_flat_curve_is_one_line() -> None:
    assert {row for _, row in dots(loss_curve([2.0] * 100, width=10, height=4))} == {8}
