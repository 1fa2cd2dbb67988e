"""Pictures with the class of each patch: what a small tower learns to see from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megavlm.data.toy_world.dice import Dice
from megavlm.data.toy_world.draw import draw, parts
from megavlm.data.toy_world.scene import Scene, draw_scene
from megavlm.data.toy_world.world import COLOURS, DIGITS, LETTERS, SHAPES, Split, ToyWorld

COLOUR_CLASSES = ("background", *COLOURS)
SHAPE_CLASSES = ("none", *SHAPES, "bar", "pie")
CHARACTER_CLASSES = ("none", *LETTERS, *DIGITS)
LEAST_SHARE = 1 / 16
"""A patch is background where nothing covers this share of it."""

Ints = NDArray[np.int64]


class PatchLabels(NamedTuple):
    """Classes of patches, each [rows, columns] or with the picture's number before."""

    colour: Ints
    """Place in COLOUR_CLASSES."""
    shape: Ints
    """Place in SHAPE_CLASSES; none in the background and in characters."""
    character: Ints
    """Place in CHARACTER_CLASSES; none in the background and in shapes."""


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures of one size, and the classes of their patches."""

    pixels: NDArray[np.uint8]
    """[pictures, height, width, 3]"""
    labels: PatchLabels


def toy_scene(split: Split, number: int, world: ToyWorld) -> Scene:
    """Picture `number` of the split's pictures without text."""
    dice = Dice("pictures", world.seed, split, number)
    return draw_scene(dice, dice.pick(world.kinds), split, world)[0]


def labels(scene: Scene, grid: tuple[int, int]) -> PatchLabels:
    """The classes of (rows, columns) patches: each has that of the part that covers most of it."""
    classes = [(0, 0, 0), *(_classes(part.colour, part.shape, part.character) for part in parts(scene))]
    chosen = np.array(classes)[covering_parts(scene, grid)]
    return PatchLabels(chosen[..., 0], chosen[..., 1], chosen[..., 2])


def covering_parts(scene: Scene, grid: tuple[int, int]) -> Ints:
    """[rows, columns]: which of the scene's parts, counted from 1, covers most of each patch; 0 is the background."""
    rows, columns = grid
    owner = np.zeros((scene.height, scene.width), dtype=np.int64)
    count = 1
    for part in parts(scene):
        inside = np.asarray(part.mask) >= 128
        under = owner[part.top : part.top + len(inside), part.left : part.left + inside.shape[1]]
        under[inside[: len(under), : under.shape[1]]] = count  # some characters stand out a pixel below the picture
        count += 1
    row_of = np.arange(scene.height) * rows // scene.height
    column_of = np.arange(scene.width) * columns // scene.width
    patch = row_of[:, None] * columns + column_of
    covered = np.bincount((patch * count + owner).ravel(), minlength=rows * columns * count)
    covered = covered.reshape(rows * columns, count)
    covered[:, 0] = np.ceil(covered.sum(1) * LEAST_SHARE) - 1
    return covered.argmax(1).reshape(rows, columns)


def _classes(colour: str, shape: str, character: str) -> tuple[int, int, int]:
    return COLOUR_CLASSES.index(colour), SHAPE_CLASSES.index(shape or "none"), _character_class(character)


def _character_class(character: str) -> int:
    return CHARACTER_CLASSES.index(character or "none")


def labelled_pictures(
    split: Split, first: int, count: int, grid: tuple[int, int], world: ToyWorld | None = None
) -> LabelledPictures:
    """Pictures first ... first + count - 1, of a world whose pictures have one size."""
    world = world or ToyWorld()
    assert len(world.sizes) == 1, f"pictures of {len(world.sizes)} sizes do not fit into one array"
    scenes = [toy_scene(split, number, world) for number in range(first, first + count)]
    found = [labels(scene, grid) for scene in scenes]
    colour, shape, character = (np.stack(column) for column in zip(*found, strict=True))
    return LabelledPictures(
        np.stack([np.asarray(draw(scene)) for scene in scenes]), PatchLabels(colour, shape, character)
    )
