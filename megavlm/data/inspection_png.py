"""An inspection as a picture: the same bars as on the terminal, drawn with PIL."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megavlm.data.files import atomic_file
from megavlm.data.inspection import ASPECT_NAMES, Inspection
from megavlm.data.inspection_text import Line, in_bytes, share
from megavlm.errors import ConfigError

PANEL = (640, 330)
"""Pixels of one plot."""
COLUMNS = 2
MARGIN, TOP, BOTTOM, HEAD = 28, 62, 64, 92
INK, QUIET, PAPER, LINE, BAR = "#1d2733", "#5b6b7c", "#ffffff", "#dde3ea", "#2f74c0"
"""Of text, lesser text, background, axes and bars."""


def write_png(found: Inspection, path: str) -> None:
    """Draw all plots into one file."""
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise ConfigError("--png", path, "cannot be written", "name a file in a folder that exists")
    stream = io.BytesIO()
    draw_inspection(found).save(stream, "PNG", optimize=True)
    with atomic_file(Path(path)) as file:
        file.write(stream.getvalue())


def draw_inspection(found: Inspection) -> Image.Image:
    """All plots, one beside and below another."""
    plots = _plots(found)
    rows = -(-len(plots) // COLUMNS)
    image = Image.new("RGB", (PANEL[0] * COLUMNS, HEAD + PANEL[1] * rows), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, 24), _fitted(draw, found.folder, 26, image.width - 2 * MARGIN), INK, _font(26))
    report = found.report
    said = [f"{report.samples:,} samples", f"{found.images:,} images", f"{found.videos:,} videos"]
    if found.counts is not None:
        said += [f"{found.counts.text.sum:,} text tokens", f"{found.counts.targets.sum:,} trained"]
    said.append(in_bytes(report.bytes))
    draw.text((MARGIN, 60), "  ·  ".join(said), QUIET, _font(16))
    for place, (title, figures, lines) in enumerate(plots):
        left, top = place % COLUMNS * PANEL[0], HEAD + place // COLUMNS * PANEL[1]
        _plot(draw, (left, top), title, figures, lines)
    return image


def _plots(found: Inspection) -> list[tuple[str, str, list[Line]]]:
    """(title, figures, bars) of each."""
    plots = []
    for name, tally in found.tallies:
        figures = f"median {tally.quantile(0.5):,}   mean {tally.mean:,.1f}   largest {tally.most:,}"
        plots.append((name, figures, [Line(f"{bar.first:,}", bar.values) for bar in tally.bars()]))
    if found.images + found.videos:
        names = [name.removeprefix("from ").replace("below 1:4", "<1:4") for name in ASPECT_NAMES]
        lines = [Line(*pair) for pair in zip(names, found.aspect.counts.tolist(), strict=True)]
        plots.insert(2, ("width to height", "each bar from the ratio below it on", lines))
    return plots


def _plot(draw: ImageDraw.ImageDraw, corner: tuple[int, int], title: str, figures: str, lines: Sequence[Line]) -> None:
    left, top = corner[0] + MARGIN, corner[1]
    width, height = PANEL[0] - 2 * MARGIN, PANEL[1] - TOP - BOTTOM
    draw.text((left, top + 6), title, INK, _font(19))
    draw.text((left, top + 32), figures, QUIET, _font(14))
    base = top + TOP + height
    draw.line((left, base, left + width, base), LINE, 2)
    most, total = max((line.values for line in lines), default=0), sum(line.values for line in lines)
    step = width / max(1, len(lines))
    for place, line in enumerate(lines):
        x = left + place * step
        tall = max(1, round((height - 22) * line.values / most)) if line.values else 0
        if tall:
            draw.rectangle((round(x + step * 0.08), base - tall, round(x + step * 0.92), base - 1), BAR)
        _middle(draw, x + step / 2, base + 8, line.label, INK, step)
        if line.values:
            _middle(draw, x + step / 2, base - tall - 17, share(line.values, total), QUIET, step)


def _middle(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, colour: str, room: float) -> None:
    """Text around x, as large as there is room for."""
    size = next((size for size in (13, 12, 11, 10, 9) if draw.textlength(text, _font(size)) <= room - 2), 8)
    draw.text((x, y), text, colour, _font(size), anchor="ma")


def _fitted(draw: ImageDraw.ImageDraw, text: str, size: int, room: float) -> str:
    """The end of a text that is too long."""
    shown = text.encode("ascii", "replace").decode()
    while draw.textlength(shown, _font(size)) > room:
        shown = "..." + shown[max(4, len(shown) // 20 + 3) :]
    return shown


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
