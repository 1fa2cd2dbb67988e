"""What a toy tower is taught: what lies on each patch and where, and for the class token how many things there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megavlm.data.tile_images import cut_tiles, resize_quick
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
from megavlm.tiles import GridConfig, plan_image

MOST_THINGS = 4
"""Shapes of a picture, characters of a word or bars of a chart."""
GRID = 8
"""Patches along each side of a picture, as InfiMM's tower sees it."""
NOT_ASKED = 255
"""The label of what a tile does not show: how many things there are in the whole picture."""

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


ON_TILES = [name in ("colour", "shape", "character") for name in PATCH_CLASSES]
"""Whether each of these can be told from a tile alone, which shows neither its place nor what stands beside it."""


class Seen(NamedTuple):
    """Pictures, or tiles of pictures, of one size and what there is to see."""

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
        np.stack([_of_patches(scene, (GRID, GRID)).reshape(GRID * GRID, -1) for scene in scenes]).astype(np.uint8),
        np.array([_of_picture(scene) for scene in scenes], np.uint8),
    )


def seen_tiles(split: Split, first: int, count: int, world: ToyWorld, grid: GridConfig) -> Seen:
    """Of each picture, as Aquila-VL's tower sees it, the base tile and then one of its grid, which come in turn."""
    pixels, of_patches, of_pictures = [], [], []
    for number in range(first, first + count):
        scene = toy_scene(split, number, world)
        plan = plan_image(scene.width, scene.height, "image", grid)
        assert plan.split is not None
        tile, side = number % (plan.tiles - 1), grid.tokens_per_side
        pixels.append(cut_tiles(plan, np.array(draw(scene)), resize_quick)[[0, 1 + tile]])
        fine = _of_patches(scene, (plan.split.rows * side, plan.split.columns * side)) * ON_TILES
        top, left = tile // plan.split.columns * side, tile % plan.split.columns * side
        of_patches += [_of_patches(scene, (side, side)), fine[top : top + side, left : left + side]]
        of_pictures += [_of_picture(scene), [NOT_ASKED] * len(PICTURE_CLASSES)]
    labels = np.stack(of_patches).reshape(2 * count, -1, len(PATCH_CLASSES))
    return Seen(np.concatenate(pixels), labels.astype(np.uint8), np.array(of_pictures, np.uint8))


def _of_patches(scene: Scene, grid: tuple[int, int]) -> NDArray[np.int64]:
    """[rows, columns, PATCH_CLASSES]"""
    said = [(0,) * len(PATCH_CLASSES), *(_looks(part) + rest for part, rest in _placed_parts(scene))]
    return np.array(said)[covering_parts(scene, grid)]


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
