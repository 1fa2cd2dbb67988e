"""Characters as masks, in fonts that differ: from the font inside PIL, and from lines of our own."""

from __future__ import annotations

from functools import lru_cache

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

_STROKES = {
    "A": "06 20 46, 14 34",
    "C": "41 30 10 01 05 16 36 45",
    "E": "40 00 06 46, 03 33",
    "F": "40 00 06, 03 33",
    "H": "00 06, 40 46, 03 43",
    "J": "40 45 36 16 05",
    "K": "00 06, 40 03 46",
    "L": "00 06 46",
    "M": "06 00 23 40 46",
    "N": "06 00 46 40",
    "P": "06 00 30 41 42 33 03",
    "R": "06 00 30 41 42 33 03, 23 46",
    "T": "00 40, 20 26",
    "U": "00 05 16 36 45 40",
    "V": "00 26 40",
    "W": "00 16 22 36 40",
    "X": "00 46, 40 06",
    "Y": "00 23 40, 23 26",
    "0": "10 30 41 45 36 16 05 01 10",
    "1": "11 20 26, 16 36",
    "2": "01 10 30 41 42 06 46",
    "3": "01 10 30 41 42 33 13, 33 44 45 36 16 05",
    "4": "36 30 04 44",
    "5": "40 00 03 33 44 45 36 16 05",
    "6": "40 10 01 05 16 36 45 44 33 03",
    "7": "00 40 16",
    "8": "10 30 41 42 33 13 02 01 10, 13 04 05 16 36 45 44 33",
    "9": "43 13 02 01 10 30 41 45 36 06",
}
"""Lines through points (x, y) of a lattice of 5 x 7."""

_FINE = 4
"""Masks of lines are drawn this many times too large, for smooth edges."""


@lru_cache(maxsize=4096)
def glyph(character: str, font: str, height: int) -> Image.Image:
    """The mask of a character, cut to its ink; `height` is that of a capital, give or take a pixel."""
    if font == "pixels":
        return _pixels(character, max(1, round(height / 7)))
    if font == "sticks":
        return _sticks(character, height)
    if font == "outline":
        return _outline(character, height)
    mask = _printed(character, height, max(1, height // 14) if font == "bold" else 0)
    mask = mask.crop(_ink(mask))
    return _slanted(mask) if font == "slanted" else mask


def word_gap(height: int) -> int:
    """Pixels between two characters."""
    return max(2, height // 7)


def word_width(word: str, font: str, height: int) -> int:
    """Pixels from the first character's left to the last one's right."""
    widths = (glyph(character, font, height).width for character in word)
    return sum(widths) + word_gap(height) * (len(word) - 1)


def _pixels(character: str, scale: int) -> Image.Image:
    mask = Image.new("L", (5, 7))
    pen = ImageDraw.Draw(mask)
    for points in _lines(character):
        pen.line(points, fill=255)
    small = mask.crop(_ink(mask))
    return small.resize((scale * small.width, scale * small.height), Image.Resampling.NEAREST)


def _sticks(character: str, height: int) -> Image.Image:
    width = max(2, round(height * _FINE / 8))
    step = (height * _FINE - width) / 6
    mask = Image.new("L", (round(4 * step) + 2 * width, height * _FINE))
    pen = ImageDraw.Draw(mask)
    for points in _lines(character):
        path = [(width + x * step * 0.9, width / 2 + y * step) for x, y in points]
        pen.line(path, fill=255, width=width, joint="curve")
        for x, y in (path[0], path[-1]):
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    small = mask.reduce(_FINE)
    return small.crop(_ink(small))


def _lines(character: str) -> list[list[tuple[int, int]]]:
    return [[(int(point[0]), int(point[1])) for point in line.split()] for line in _STROKES[character].split(",")]


@lru_cache(maxsize=64)
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    _, top, _, bottom = ImageFont.load_default(size=100).getbbox("H")
    return ImageFont.load_default(size=100 * height / (bottom - top))


def _printed(character: str, height: int, weight: int) -> Image.Image:
    mask = Image.new("L", (3 * height, 3 * height))
    pen = ImageDraw.Draw(mask)
    pen.text((height, height), character, fill=255, font=_font(height), stroke_width=weight)
    return mask


def _slanted(mask: Image.Image) -> Image.Image:
    lean = 0.3
    size = (mask.width + round(lean * mask.height), mask.height)
    shift = -lean * mask.height
    turned = mask.transform(size, Image.Transform.AFFINE, (1, lean, shift, 0, 1, 0), Image.Resampling.BILINEAR)
    return turned.crop(_ink(turned))


def _outline(character: str, height: int) -> Image.Image:
    """The edge of a fat character."""
    fine = _printed(character, 2 * height, max(2, height // 6))
    inside = fine.filter(ImageFilter.MinFilter(5))
    edge = ImageChops.subtract(fine, inside).reduce(2)
    return edge.crop(_ink(edge))


def _ink(mask: Image.Image) -> tuple[int, int, int, int]:
    box = mask.getbbox()
    assert box is not None, "a mask without ink"
    return box
