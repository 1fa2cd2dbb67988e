"""A loss curve for a terminal, in a few lines of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bit of each dot of a Braille character, by row and column."""
_BLANK = 0x2800


def loss_curve(losses: Sequence[float], width: int = 60, height: int = 8) -> str:
    """The losses from left to right, `width` characters wide and `height` lines high, beside the scale's ends.

    Each character has 2 x 4 dots. Where there are more losses than columns of dots, a column is their mean; losses
    that are not finite leave gaps.
    """
    assert width >= 1 and height >= 1, (width, height)
    columns = _columns(losses, 2 * width)
    finite = [value for value in columns if value is not None]
    if not finite:
        return "no finite loss"
    low, high = min(finite), max(finite)
    rows = _drawn(columns, low, high, width, height)
    scale = [f"{high:.3g}", *[""] * (height - 2), f"{low:.3g}"] if height > 1 else [f"{high:.3g}"]
    margin = max(map(len, scale))
    lines = [f"{text:>{margin}} ┤{row.rstrip(chr(_BLANK))}" for text, row in zip(scale, rows, strict=True)]
    return "\n".join([*lines, f"{'':{margin}} └{'─' * width}", _numbers(margin, width, len(losses))])


def _numbers(margin: int, width: int, steps: int) -> str:
    """The line below: the first and the last."""
    last = f"{steps:,}"
    return f"{'':{margin}}  1{last:>{max(width - 1, len(last) + 1)}}"


def _columns(losses: Sequence[float], count: int) -> list[float | None]:
    """The mean of the finite losses of each column; None where there are none."""
    count = min(count, len(losses))
    found: list[float | None] = []
    for column in range(count):
        part = losses[column * len(losses) // count : (column + 1) * len(losses) // count]
        finite = [value for value in part if math.isfinite(value)]
        found.append(sum(finite) / len(finite) if finite else None)
    return found


def _drawn(columns: Sequence[float | None], low: float, high: float, width: int, height: int) -> list[str]:
    """The lines of characters; neighbouring columns are joined by upright strokes."""
    cells = [[0] * width for _ in range(height)]
    spread = max(2 * width // len(columns), 1)  # few losses are drawn as steps over the whole width
    before: int | None = None
    for place, value in enumerate(columns):
        if value is None:
            before = None
            continue
        row = round((high - value) / (high - low) * (4 * height - 1)) if high > low else 2 * height
        for x in range(place * spread, (place + 1) * spread):
            top, bottom = sorted((row, row if before is None else before))
            for y in range(top, bottom + 1):
                cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
            before = row
    return ["".join(chr(_BLANK + cell) for cell in line) for line in cells]
