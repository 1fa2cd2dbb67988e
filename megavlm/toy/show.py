"""What a quickstart shows: a table of scores, the loss as a curve in the terminal, and pictures with answers."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megavlm.data.toy_world.world import PictureKind
from megavlm.toy.quiz import Asked, Score, mean

_COLUMNS = {
    "answers": "held_out",
    "new pictures": "unseen_pictures",
    "new combinations": "unseen_combinations",
    "shuffled": "shuffled",
    "no picture": "without",
    "chance": "chance",
}
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character, by row and column of its dots."""


def score_table(scores: Mapping[PictureKind, Score]) -> str:
    """Percentages by kind of question."""
    head = f"{'asked of unseen pictures, % right':<34}" + "".join(f"{name:>18}" for name in _COLUMNS)
    lines = [
        f"{kind:<34}" + "".join(f"{100 * getattr(score, field):>18.0f}" for field in _COLUMNS.values())
        for kind, score in scores.items()
    ]
    last = f"{'mean':<34}" + "".join(f"{100 * mean(scores, field):>18.0f}" for field in _COLUMNS.values())
    return "\n".join([head, *lines, last])


def losses_in(log: Path) -> list[tuple[int, float]]:
    """(iteration, loss) of what `--log-json` wrote."""
    entries = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    steps = [(entry["iteration"], entry["losses"]["lm loss"]) for entry in entries if entry["kind"] == "step"]
    return [(step, loss) for step, loss in steps if loss is not None]  # null: not finite


def curve(stages: Mapping[str, Sequence[tuple[int, float]]], width: int = 72, height: int = 10) -> str:
    """The losses of stages side by side, in dots of which a character has 2 x 4."""
    values = [loss for found in stages.values() for _, loss in found]
    if not values:
        return "no losses"
    top, share = max(values), max(1, width // len(stages))
    marks = [[0] * (share * len(stages)) for _ in range(height)]
    for number, found in enumerate(stages.values()):
        last = max((step for step, _ in found), default=1)
        for step, loss in found:
            x = number * 2 * share + min(2 * share - 2, (2 * share - 2) * step // last)
            y = min(4 * height - 1, int((1 - loss / top) * 4 * height))
            marks[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
    lines = []
    for row, line in enumerate(marks):
        level = f"{top * (height - row) / height:6.2f} " if row % 3 == 0 else " " * 7
        lines.append(level + "".join(chr(0x2800 + dots) for dots in line).rstrip("\u2800"))
    return "\n".join(["lm loss", *lines, " " * 7 + "".join(f"{name:<{share}}" for name in stages)])


def picture_sheet(asked: Sequence[Asked], file: Path, columns: int = 4, scale: int = 3) -> None:
    """Pictures with their questions and answers, as a PNG."""
    side, text, edge = 64 * scale, 62, 10
    rows = -(-len(asked) // columns)
    sheet = Image.new("RGB", (columns * (side + edge) + edge, rows * (side + text + edge) + edge), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, one in enumerate(asked):
        left = edge + number % columns * (side + edge)
        top = edge + number // columns * (side + text + edge)
        sheet.paste(one.picture.resize((side, side), Image.Resampling.NEAREST), (left, top))
        question = textwrap.wrap(one.question.text, 32)[:2]
        pen.multiline_text((left, top + side + 3), "\n".join(question), fill="black", font=font)
        colour = "darkgreen" if one.is_right else "firebrick"
        said = one.answer if one.is_right else f"{one.answer}  (right: {one.question.answer})"
        pen.text((left, top + side + 38), said, fill=colour, font=ImageFont.load_default(size=15))
    sheet.save(file)


def some_of_each(asked: Sequence[Asked], count: int) -> list[Asked]:
    """`count` of these, of all kinds in turn, each kind's in their order: none is chosen for its answer."""
    by_kind: dict[str, list[Asked]] = {}
    for one in asked:
        by_kind.setdefault(one.question.kind, []).append(one)
    turns = [one for group in zip(*by_kind.values(), strict=False) for one in group]
    return turns[:count]
