"""From a scene to its pixels, by way of the parts that are laid on its background."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from megavlm.data.toy_world.glyphs import glyph, word_gap
from megavlm.data.toy_world.scene import Background, Bar, Chart, Scene, Word
from megavlm.data.toy_world.world import COLOURS, MOST_VALUE

PNG_LEVEL = 1
"""A third faster than the usual 6, for files 11 % larger."""
JPEG_QUALITY = 92
_FINE = 8
"""Masks are drawn this many times too large, for smooth edges."""
_GRID_COLOUR = (190, 190, 190)


class Part(NamedTuple):
    """Something of one colour, and what it is."""

    mask: Image.Image
    left: int
    top: int
    colour: str
    shape: str = ""
    """A shape, `bar` or `pie`; empty for a character."""
    character: str = ""


def draw(scene: Scene) -> Image.Image:
    """The picture."""
    image = _background(scene.background, scene.width, scene.height)
    if isinstance(scene.content, Chart) and scene.content.style == "bars":
        _draw_grid(image, scene.content)
    for part in parts(scene):
        red, green, blue = (min(255, max(0, level + scene.shade)) for level in COLOURS[part.colour])
        image.paste((red, green, blue), (part.left, part.top), part.mask)
    return image


def encode(image: Image.Image, picture_format: Literal["png", "jpeg"]) -> bytes:
    """The bytes of a picture file."""
    file = io.BytesIO()
    if picture_format == "png":
        image.save(file, "PNG", compress_level=PNG_LEVEL)
    else:
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)  # thin lines keep their colour
    return file.getvalue()


def parts(scene: Scene) -> Iterator[Part]:
    """What lies on the background, back to front."""
    content = scene.content
    if isinstance(content, Word):
        yield from _word_parts(content)
    elif isinstance(content, Chart):
        yield from _pie_parts(content) if content.style == "pie" else _bar_parts(content)
    else:
        for one in content:
            mask = _shape_mask(one.shape, one.size, one.turn)
            yield Part(mask, one.left, one.top, one.colour, shape=one.shape)


def _background(background: Background, width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), background.colour)
    if background.style == "slope":
        right, bottom = background.slope
        darker = np.linspace(0, right, width, dtype=np.uint8) + np.linspace(0, bottom, height, dtype=np.uint8)[:, None]
        return Image.fromarray(np.array(background.colour, dtype=np.uint8) - darker[:, :, None])
    if background.style == "stripes":
        step, depth = background.slope
        red, green, blue = (level - depth for level in background.colour)
        for left in range(0, width, 2 * step):
            image.paste((red, green, blue), (left, 0, min(left + step, width), height))
    return image


@lru_cache(maxsize=4096)
def _shape_mask(shape: str, size: int, turn: int) -> Image.Image:
    side = size * _FINE
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
    if shape == "ring":
        edge = side * 0.25
        pen.ellipse((edge, edge, side - 1 - edge, side - 1 - edge), fill=0)
    if shape in _CORNERS:
        angle = math.radians(turn)
        cosine, sine = math.cos(angle), math.sin(angle)
        turned = [(x * cosine - y * sine, x * sine + y * cosine) for x, y in _CORNERS[shape]]
        pen.polygon([((1 + x) * side / 2, (1 + y) * side / 2) for x, y in turned], fill=255)
    return mask.reduce(_FINE)


def _spokes(radii: tuple[float, ...], count: int) -> list[tuple[float, float]]:
    angles = [2 * math.pi * number / count - math.pi / 2 for number in range(count)]
    return [
        (radii[number % len(radii)] * math.cos(a), radii[number % len(radii)] * math.sin(a))
        for number, a in enumerate(angles)
    ]


def _cross(thick: float, long: float) -> list[tuple[float, float]]:
    arm = [(-thick, -long), (thick, -long), (thick, -thick)]
    return [*arm, *((-y, x) for x, y in arm), *((-x, -y) for x, y in arm), *((y, -x) for x, y in arm)]


_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": _spokes((1.0,), 3),
    "star": _spokes((1.0, 0.42), 10),
    "cross": _cross(0.32, 0.95),
}
"""Corners within a circle of radius 1."""


def _word_parts(word: Word) -> Iterator[Part]:
    left = word.left
    for character in word.text:
        mask = glyph(character, word.font, word.height)
        yield Part(mask, left, word.top + max(0, word.height - mask.height), word.colour, character=character)
        left += mask.width + word_gap(word.height)


class _Frame(NamedTuple):
    """Where the bars of a chart stand, in pixels."""

    left: int
    bottom: int
    pitch: int
    unit: int
    label: int
    """Height of a label."""


def _frame(chart: Chart) -> _Frame:
    label = max(7, 7 * round(chart.side / 64))
    axis = label + 1 if chart.style == "bars" else 0
    unit = (chart.side - label - label // 2 - 3) // MOST_VALUE  # half a label stands out above the topmost line
    pitch = (chart.side - axis) // len(chart.bars)
    return _Frame(chart.left + axis, chart.top + chart.side - label - 2, pitch, unit, label)


def _draw_grid(image: Image.Image, chart: Chart) -> None:
    frame = _frame(chart)
    pen = ImageDraw.Draw(image)
    for value in range(MOST_VALUE + 1):
        level = frame.bottom - value * frame.unit
        pen.line((frame.left, level, chart.left + chart.side - 1, level), fill=_GRID_COLOUR)


def _bar_parts(chart: Chart) -> Iterator[Part]:
    frame = _frame(chart)
    if chart.style == "bars":
        for value in range(1, MOST_VALUE + 1):
            mask = glyph(str(value), "pixels", frame.label)
            yield Part(mask, chart.left, frame.bottom - value * frame.unit - frame.label // 2, "black", "", str(value))
    for number, bar in enumerate(chart.bars):
        width = round(0.66 * frame.pitch)
        left = frame.left + number * frame.pitch + (frame.pitch - width) // 2
        yield from _column(chart, bar, left, width)
        mask = glyph(bar.label, "pixels", frame.label)
        yield Part(mask, left + (width - mask.width) // 2, frame.bottom + 2, "black", character=bar.label)


def _column(chart: Chart, bar: Bar, left: int, width: int) -> Iterator[Part]:
    frame = _frame(chart)
    if chart.style == "bars":
        height = bar.value * frame.unit
        yield Part(_box(width, height), left, frame.bottom - height, bar.colour, shape="bar")
        return
    gap = max(2, frame.unit // 5)
    for number in range(1, bar.value + 1):
        yield Part(_box(width, frame.unit - gap), left, frame.bottom - number * frame.unit, bar.colour, shape="bar")


@lru_cache(maxsize=4096)
def _box(width: int, height: int) -> Image.Image:
    return Image.new("L", (width, height), 255)


def _pie_parts(chart: Chart) -> Iterator[Part]:
    """All of one colour is one part, cut by gaps into as many pieces as its value says."""
    step = 360 / sum(bar.value for bar in chart.bars)
    start = float(chart.turn)
    for bar in chart.bars:
        mask = _pie_mask(chart.side, start, step, bar.value)
        box = mask.getbbox()
        assert box is not None
        yield Part(mask.crop(box), chart.left + box[0], chart.top + box[1], bar.colour, shape="pie")
        start += step * bar.value


def _pie_mask(side: int, start: float, step: float, count: int) -> Image.Image:
    fine = 4
    mask = Image.new("L", (side * fine, side * fine))
    pen = ImageDraw.Draw(mask)
    square = (2 * fine, 2 * fine, (side - 2) * fine, (side - 2) * fine)
    pen.pieslice(square, start, start + step * count, fill=255)
    middle, radius = side * fine / 2, side * fine / 2
    for number in range(count + 1):
        angle = math.radians(start + number * step)
        edge = (middle + radius * math.cos(angle), middle + radius * math.sin(angle))
        pen.line((middle, middle, *edge), fill=0, width=max(fine, side // 12))
    return mask.reduce(fine)
