"""What a toy tower is taught: what lies on each patch and where, and for the class token how many things there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megavlm.data.toy_world.draw import Part, draw, parts
from megavlm.data.toy_world.labels import (
    CHARACTER_CLASSES,
    COLOUR_CLASSES,
    SHAPE_CLASSES,
    covering_parts,
    toy_scene,
)
from megavlm.data.toy_world.scene import Bar, Chart, Scene, Word
from megavlm.data.toy_world.world import COLOURS, MOST_VALUE, SHAPES, Split, ToyWorld

MOST_THINGS = 4
"""Shapes of a picture, characters of a word or bars of a chart."""
GRID = 8
"""Patches along each side of a picture."""

PATCH_CLASSES = {
    "colour": len(COLOUR_CLASSES),
    "shape": len(SHAPE_CLASSES),
    "character": len(CHARACTER_CLASSES),
    "row": 4,
    "column": 4,
    "order": 1 + MOST_THINGS,
    "value": 1 + MOST_VALUE,
}
"""What is said of a patch -> how many classes there are, the first of which is `none`: colour, shape and character as
in `labels`; row and column of the place where the shape lies; which character of the word or bar of the chart it is;
the bar's value."""
PICTURE_CLASSES = dict.fromkeys(("things", *COLOURS, *SHAPES), 1 + MOST_THINGS)
"""What is said of a whole picture -> classes: how many things there are, and how many shapes of each colour, form."""


class Seen(NamedTuple):
    """Pictures of 64x64 pixels and what there is to see."""

    pixels: NDArray[np.uint8]
    """[pictures, height, width, 3]"""
    of_patches: NDArray[np.uint8]
    """[pictures, patches, PATCH_CLASSES]"""
    of_pictures: NDArray[np.uint8]
    """[pictures, PICTURE_CLASSES]"""


def seen_pictures(split: Split, first: int, count: int, world: ToyWorld) -> Seen:
    """Pictures first ... first + count - 1 of a split."""
    scenes = [toy_scene(split, number, world) for number in range(first, first + count)]
    return Seen(
        np.stack([np.asarray(draw(scene)) for scene in scenes]),
        np.stack([_of_patches(scene) for scene in scenes]).astype(np.uint8),
        np.array([_of_picture(scene) for scene in scenes], np.uint8),
    )


def _of_patches(scene: Scene) -> NDArray[np.int64]:
    """[patches, PATCH_CLASSES]"""
    said = [(0,) * len(PATCH_CLASSES), *(_looks(part) + rest for part, rest in _placed_parts(scene))]
    return np.array(said)[covering_parts(scene, (GRID, GRID)).ravel()]


def _looks(part: Part) -> tuple[int, ...]:
    character = CHARACTER_CLASSES.index(part.character or "none")
    return COLOUR_CLASSES.index(part.colour), SHAPE_CLASSES.index(part.shape or "none"), character


def _placed_parts(scene: Scene) -> Iterator[tuple[Part, tuple[int, ...]]]:
    """Each part with its row, column, order and value."""
    content = scene.content
    if isinstance(content, Word):
        yield from ((part, (0, 0, 1 + number, 0)) for number, part in enumerate(parts(scene)))
    elif isinstance(content, Chart):
        yield from ((part, (0, 0, order, value)) for part, order, value in _chart_parts(scene, content))
    else:
        places = ((1 + one.row, 1 + one.column, 0, 0) for one in content)
        yield from zip(parts(scene), places, strict=True)


def _chart_parts(scene: Scene, chart: Chart) -> Iterator[tuple[Part, int, int]]:
    """Columns and pieces of a pie, each with its number and value; a bar's label, which stands behind it, too."""
    order = 1
    for part in parts(scene):
        bar: Bar | None = chart.bars[order - 1] if order <= len(chart.bars) else None
        is_axis = bool(part.character) and (bar is None or part.character != bar.label)
        yield (part, 0, 0) if is_axis or bar is None else (part, order, bar.value)
        if part.shape == "pie" or (part.character and not is_axis):
            order += 1


def _of_picture(scene: Scene) -> list[int]:
    content = scene.content
    if isinstance(content, Word):
        return [len(content.text)] + [0] * (len(PICTURE_CLASSES) - 1)
    if isinstance(content, Chart):
        return [len(content.bars)] + [0] * (len(PICTURE_CLASSES) - 1)
    looks = [one.colour for one in content] + [one.shape for one in content]
    return [len(content), *(looks.count(name) for name in (*COLOURS, *SHAPES))]
