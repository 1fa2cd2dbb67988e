"""What the toy world consists of, its settings, and what its training split never shows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from megavlm.config import Config, require
from megavlm.data.toy_world.dice import Dice

Split = Literal["train", "unseen_pictures", "unseen_combinations"]
SampleKind = Literal["pairs", "documents", "chat", "multi_image", "text"]
PictureKind = Literal["colour", "shape", "position", "relation", "count", "count_by", "reading", "character", "chart"]
"""What is asked of one picture: `relation` of the places of two shapes, `count_by` for the shapes of a colour or form,
`reading` for the whole word, `character` for its first or last one."""
Kind = PictureKind | Literal["compare", "text"]
"""`compare` asks about several pictures, `text` about none."""

SPLITS: tuple[Split, ...] = get_args(Split)
SAMPLE_KINDS: tuple[SampleKind, ...] = get_args(SampleKind)
PICTURE_KINDS: tuple[PictureKind, ...] = get_args(PictureKind)
KINDS: tuple[Kind, ...] = (*PICTURE_KINDS, "compare", "text")

SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
COLOURS = {
    "red": (214, 30, 30),
    "orange": (250, 130, 10),
    "yellow": (230, 195, 0),
    "green": (25, 145, 45),
    "cyan": (0, 175, 190),
    "blue": (30, 65, 220),
    "purple": (140, 40, 175),
    "black": (20, 20, 20),
}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
LETTERS, DIGITS = "ACEFHJKLMNPRTUVWXY", "0123456789"
"""Letters that look like a digit (B, D, G, I, O, Q, S, Z) do not occur."""
FONTS = ("sans", "bold", "slanted", "outline", "sticks", "pixels")
CHART_STYLES = ("bars", "blocks", "pie")
MOST_VALUE, MOST_PARTS = 5, 8
"""The highest value in a chart, and the highest sum of values in a pie."""

BASE_SIDE = 64
"""Pixels along the short side at which the smallest details are still clear."""


@dataclass(frozen=True, kw_only=True)
class ToyWorld(Config):
    """Settings of the toy world; easier ones for the start of a training have fewer shapes and shorter words."""

    seed: int = 0
    """Another seed gives other pictures; what is held out stays the same."""
    sizes: tuple[tuple[int, ...], ...] = ((BASE_SIDE, BASE_SIDE),)
    """(width, height) in pixels; each picture has one of these."""
    details: tuple[float, ...] = (1.0,)
    """How large things are drawn, relative to things that fill the picture; each picture has one of these. In a large
    picture with 0.3, shapes and words are clear on its tiles alone. Nothing gets smaller than in a picture of 64x64."""
    kinds: tuple[PictureKind, ...] = PICTURE_KINDS
    """Kinds of questions, asked equally often; pictures suit them. A kind named twice comes twice as often."""
    questions: int = 4
    """The most questions about a picture in one conversation."""
    most_shapes: int = 4
    """The most shapes in a picture."""
    longest_word: int = 4
    """The most characters in a word or number; the fewest are 2."""
    places: int = 3
    """A shape lies in one of this many rows, and of this many columns: 2, or 3 with the middle ones."""
    picture_format: Literal["png", "jpeg"] = "png"
    """How pictures are encoded."""

    def check(self) -> None:
        require(bool(self.sizes), self, "sizes", "is empty", "use [[64, 64]]")
        for size in self.sizes:
            fits = len(size) == 2 and min(size) >= BASE_SIDE and max(size) <= 4096
            require(fits, self, "sizes", f"holds {list(size)}", "use pairs of 64 to 4096 pixels")
        fits = bool(self.details) and all(0 < detail <= 1 for detail in self.details)
        require(fits, self, "details", "holds none, or one outside 0 to 1", "use [1.0]")
        require(bool(self.kinds), self, "kinds", "is empty", f"use some of {', '.join(PICTURE_KINDS)}")
        require(self.questions >= 1, self, "questions", "is below 1", "use 1 or more")
        require(2 <= self.most_shapes <= 4, self, "most_shapes", "is not 2, 3 or 4", "use 4")
        require(2 <= self.longest_word <= 4, self, "longest_word", "is not 2, 3 or 4", "use 4")
        require(self.places in (2, 3), self, "places", "is neither 2 nor 3", "use 3")


def _held_out_places() -> frozenset[tuple[str, int, int]]:
    spread = [(5 * number + 2) % 9 for number in range(len(COLOURS))]  # 5 and 9 have no common divisor: all differ
    return frozenset((colour, place // 3, place % 3) for colour, place in zip(COLOURS, spread, strict=True))


HELD_OUT_LOOKS = frozenset((shape, tuple(COLOURS)[3 * number % 8]) for number, shape in enumerate(SHAPES))
"""(shape, colour) that never occur in training: one colour for each shape."""
HELD_OUT_PLACES = _held_out_places()
"""(colour, row, column) that never occur in training: one place for each colour."""
HELD_OUT_VALUES = frozenset((colour, 1 + 3 * number % MOST_VALUE) for number, colour in enumerate(COLOURS))
"""(colour, value in a chart) that never occur in training: one value for each colour."""


@lru_cache(maxsize=1 << 16)
def is_held_out_word(word: str) -> bool:
    """Whether training never shows this word, number or sum: one in ten."""
    return Dice("held out", word).below(10) == 0
