"""What a picture shows: drawn from dice, within what its split allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megavlm.data.toy_world.dice import Dice
from megavlm.data.toy_world.glyphs import word_width
from megavlm.data.toy_world.world import (
    BASE_SIDE,
    CHART_STYLES,
    COLOURS,
    COLUMNS,
    DIGITS,
    FONTS,
    HELD_OUT_LOOKS,
    HELD_OUT_PLACES,
    HELD_OUT_VALUES,
    LETTERS,
    MOST_PARTS,
    MOST_VALUE,
    ROWS,
    SHAPES,
    PictureKind,
    Split,
    ToyWorld,
    is_held_out_word,
)


@dataclass(frozen=True)
class Background:
    """A light colour, plain, or changing steadily or in stripes."""

    style: str
    colour: tuple[int, int, int]
    slope: tuple[int, int]
    """How much darker the right and the bottom edge are; in stripes, pixels of a stripe and how much darker it is."""


@dataclass(frozen=True)
class Shape:
    """A coloured form somewhere in one of the places."""

    shape: str
    colour: str
    row: int
    column: int
    left: int
    top: int
    size: int
    turn: int
    """Degrees."""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"

    @property
    def is_held_out(self) -> bool:
        """Whether it shows a combination that training never shows."""
        look, place = (self.shape, self.colour), (self.colour, self.row, self.column)
        return look in HELD_OUT_LOOKS or place in HELD_OUT_PLACES


@dataclass(frozen=True)
class Word:
    """Two to four letters, or digits."""

    text: str
    font: str
    colour: str
    height: int
    left: int
    top: int

    @property
    def is_number(self) -> bool:
        return self.text.isdigit()


@dataclass(frozen=True)
class Bar:
    """One value of a chart."""

    label: str
    """A letter; in a pie without use."""
    colour: str
    value: int

    @property
    def is_held_out(self) -> bool:
        """Whether it shows a combination that training never shows."""
        return (self.colour, self.value) in HELD_OUT_VALUES


@dataclass(frozen=True)
class Chart:
    """Two to four values as bars, as blocks on each other, or as a pie of equal parts."""

    style: str
    bars: tuple[Bar, ...]
    left: int
    top: int
    side: int
    """Pixels along the square that the chart fills."""
    turn: int
    """Degrees by which a pie is turned."""


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn."""

    width: int
    height: int
    background: Background
    shade: int
    """Added to each channel of the things' colours."""
    content: tuple[Shape, ...] | Word | Chart
    """Shapes in reading order."""


class Alike(NamedTuple):
    """How many of a scene's shapes share a colour or a form."""

    colour: str
    """Empty where it is the form that they share."""
    shape: str
    number: int


def draw_scene(dice: Dice, kind: PictureKind, split: Split, world: ToyWorld) -> tuple[Scene, Alike | None]:
    """A scene of which this kind of question can be asked; for `count_by`, also what to count."""
    size = dice.pick(world.sizes)
    scale = max(1.0, min(size) / BASE_SIDE * dice.pick(world.details))
    alike = None
    content: tuple[Shape, ...] | Word | Chart
    if kind in ("reading", "character"):
        content = _word(dice, split, world.longest_word, size, scale)
    elif kind == "chart":
        content = _chart(dice, split, size, scale)
    else:
        looks, alike = _looks_at_places(dice, kind, split, world)
        shapes = [_shape(dice, look, place, world.places, size, scale) for look, place in looks.items()]
        content = tuple(sorted(shapes, key=lambda one: (one.row, one.column)))
    width, height = size
    return Scene(width, height, _background(dice), dice.between(-10, 10), content), alike


def _background(dice: Dice) -> Background:
    low = dice.between(228, 246)
    red, green, blue = (low + dice.below(256 - low) for _ in range(3))
    style = dice.pick(("plain", "slope", "stripes"))
    slope = (dice.between(4, 12), dice.between(4, 14)) if style == "stripes" else (dice.below(24), dice.below(24))
    return Background(style, (red, green, blue), slope)


def _alike(dice: Dice, most: int) -> Alike:
    count = dice.between(0, most)
    by_colour = dice.below(2)
    return Alike(dice.pick(tuple(COLOURS)), "", count) if by_colour else Alike("", dice.pick(SHAPES), count)


Look = tuple[str, str]
"""(shape, colour)"""
Place = tuple[int, int]
"""(row, column)"""

_SEEN_LOOKS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS if (shape, colour) not in HELD_OUT_LOOKS)


def _looks_at_places(
    dice: Dice, kind: PictureKind, split: Split, world: ToyWorld
) -> tuple[dict[Look, Place], Alike | None]:
    """Looks that all differ, each at another place. Some draws fit no places and are drawn again."""
    is_new = split == "unseen_combinations"
    least = 2 if kind == "relation" else int(is_new or kind not in ("count", "count_by"))
    while True:
        alike = _alike(dice, world.most_shapes) if kind == "count_by" else None
        count = dice.between(max(least, alike.number if alike else 0), world.most_shapes)
        looks = _looks(dice, count, alike, is_new)
        places = _places(dice, looks, is_new, world)
        if places is not None:
            return places, alike


def _looks(dice: Dice, count: int, alike: Alike | None, is_new: bool) -> list[Look]:
    """Looks of training; where combinations are to be new, the first is held out half the time."""
    first = [dice.pick(sorted(HELD_OUT_LOOKS))] if is_new and dice.below(2) else []
    if alike is None:
        return first + dice.several(_SEEN_LOOKS, count - len(first))
    same = [look for look in _SEEN_LOOKS if _fits(look, alike)]
    others = [look for look in _SEEN_LOOKS if not _fits(look, alike)]
    if first and _fits(first[0], alike) and alike.number:
        return first + dice.several(same, alike.number - 1) + dice.several(others, count - alike.number)
    if count == alike.number or (first and _fits(first[0], alike)):
        first = []
    return first + dice.several(same, alike.number) + dice.several(others, count - alike.number - len(first))


def _fits(look: Look, alike: Alike) -> bool:
    return alike.shape == look[0] or alike.colour == look[1]


def _places(dice: Dice, looks: list[Look], is_new: bool, world: ToyWorld) -> dict[Look, Place] | None:
    """Places of training; where combinations are to be new and no look is held out, one held-out place."""
    steps = (0, 2) if world.places == 2 else (0, 1, 2)
    free = [(row, column) for row in steps for column in steps]
    taken: dict[Look, Place] = {}
    if is_new and not HELD_OUT_LOOKS & set(looks):
        new = [(look, place) for look in looks for place in free if (look[1], *place) in HELD_OUT_PLACES]
        if not new:
            return None
        look, place = dice.pick(new)
        taken[look] = place
    for look in looks:
        if look not in taken:
            seen = [place for place in free if place not in taken.values() and (look[1], *place) not in HELD_OUT_PLACES]
            if not seen:
                return None
            taken[look] = dice.pick(seen)
    return taken


def _shape(dice: Dice, look: Look, place: Place, places: int, size: tuple[int, ...], scale: float) -> Shape:
    """Anywhere within its place, with a free pixel on each side."""
    width, height = size[0] / places, size[1] / places
    row, column = (index * (places - 1) // 2 for index in place)
    side = dice.between(int(BASE_SIDE * scale / places * 0.7), int(BASE_SIDE * scale / places * 0.92))
    left = dice.between(int(column * width) + 1, int((column + 1) * width) - side - 1)
    top = dice.between(int(row * height) + 1, int((row + 1) * height) - side - 1)
    return Shape(*look, *place, left, top, side, dice.pick((-15, 0, 0, 15)))


def _word(dice: Dice, split: Split, longest: int, size: tuple[int, ...], scale: float) -> Word:
    text = toy_word(dice, split, longest)
    font = dice.pick(FONTS)
    wanted = dice.between(round(15 * scale), round(24 * scale))
    room = round(BASE_SIDE * scale) - 4
    most = min(wanted, wanted * room // word_width(text, font, wanted) + 1)
    height = next(one for one in range(most, 6, -1) if word_width(text, font, one) <= room)
    left = dice.between(2, size[0] - 2 - word_width(text, font, height))
    return Word(text, font, dice.pick(tuple(COLOURS)), height, left, dice.between(2, size[1] - height - 4))


def toy_word(dice: Dice, split: Split, longest: int) -> str:
    """Letters or digits at random, held out or not as the split wants it."""
    while True:
        characters = dice.pick((LETTERS, LETTERS, DIGITS))
        text = "".join(dice.pick(characters) for _ in range(dice.between(2, longest)))
        if is_held_out_word(text) == (split == "unseen_combinations"):
            return text


def _chart(dice: Dice, split: Split, size: tuple[int, ...], scale: float) -> Chart:
    style = dice.pick(CHART_STYLES)
    side = round((BASE_SIDE - 2) * scale)
    left, top = dice.between(1, size[0] - side - 1), dice.between(1, size[1] - side - 1)
    while True:
        count = dice.between(2, 4)
        colours = dice.several(tuple(COLOURS), count)
        labels = sorted(dice.several(LETTERS, count))
        values = [dice.between(1, MOST_VALUE) for _ in range(count)]
        bars = tuple(Bar(*bar) for bar in zip(labels, colours, values, strict=True))
        fits = style != "pie" or sum(values) <= MOST_PARTS
        if fits and any(bar.is_held_out for bar in bars) == (split == "unseen_combinations"):
            return Chart(style, bars, left, top, side, dice.below(360))
