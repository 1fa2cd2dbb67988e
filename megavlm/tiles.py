"""The image-token contract: which tiles an image is cut into, how many tokens it costs, how its patches lie in memory.

Preparation, packer, assembler, planner and exporter count image tokens here and nowhere else.

An image alone in its sample, where the setting has a grid (LLaVA-OneVision's "anyres"):

1. A grid of tiles is chosen; the image, its aspect kept, is resized into it and centred on black.
2. Tiles: the base tile (the whole image squeezed into one tile, its aspect lost), then those of the grid, row-major.
3. The features of the grid's tiles are joined to one map. Its lines that hold padding alone are dropped, equally many
   on both sides. What then exceeds the cap by more than CAP_SLACK is shrunk to it, bilinearly.
4. Tokens: those of the base tile, then the map, row-major, each of its rows closed by the learned newline.

An image that shares its sample with others is padded to a square and costs one tile and a newline. A video costs, for
each frame, one squeezed tile whose map is shrunk bilinearly to half its sides, rounded up; and one newline at its end.
Where the setting has no grid, an image alone in its sample is one squeezed tile, and nothing has a newline.

Patch rows of a batch: its images in the order of their tags, the tiles of each in the order above, the patches of a
tile row-major, the values of a patch in the order (channel, y, x). Pixels at a tile's right and bottom that fill no
patch (6 of 384) are left out. So patch (y, x) of tile t is row t * tokens_per_tile + y * tokens_per_side + x of its
image.

Every size from 1x1 up has a result. An image so thin that no grid shows a whole pixel of its short side takes the grid
of one tile. The map of a thin image keeps its middle line where tokens_per_side is odd, as in SigLIP's 27; where it is
even, the map may be empty, and the base tile is all there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from megavlm.config import Config, require
from megavlm.errors import DataError

Ints = NDArray[np.int64]
Number = TypeVar("Number", int, Ints)

MediaKind = Literal["image", "one_of_several", "video"]
"""An image alone in its sample, one of several in its sample, a video."""

CAP_SLACK = 1.1
"""How far each side of a map may exceed the cap, in the mean, before the map is shrunk."""
LONGEST_SIDE = 10_000_000
"""Pixels. Up to here whole numbers give exactly the map that LLaVA-NeXT's floats, rounded to 7 digits, give."""


@dataclass(frozen=True, kw_only=True)
class GridConfig(Config):
    """How images become tiles and tokens."""

    tile_size: int = 384
    """Pixels along a tile's side: what the tower takes."""
    patch_size: int = 14
    """Pixels along a patch's side."""
    tiling: Literal["single", "grid"] = "grid"
    """An image is one tile, without newlines; or a base tile and a grid, with newlines."""
    max_tiles_per_side: int = 6
    """The candidates are all grids from (1x1) to (this x this) tiles; without meaning where an image is one tile."""
    cap_tiles: int = 9
    """A map of more tokens than this many tiles have is shrunk: the M of `anyres_max_M`."""

    def check(self) -> None:
        require(self.patch_size >= 1, self, "patch_size", "is below 1", "use 14 for SigLIP-so400m")
        remedy = f"use {self.patch_size} or more"
        require(self.tile_size >= self.patch_size, self, "tile_size", "holds no patch", remedy)
        require(self.cap_tiles >= 1, self, "cap_tiles", "is below 1", "use 1 or more")
        require(self.max_tiles_per_side >= 1, self, "max_tiles_per_side", "is below 1", "use 1 or more")
        most = self.cap_tiles * self.tokens_per_side
        problem = f"lets a cap of {self.cap_tiles} tiles shrink the map of a long image to nothing"
        require(self.max_tiles_per_side <= most, self, "max_tiles_per_side", problem, f"use {most} or less")

    @property
    def tokens_per_side(self) -> int:
        return self.tile_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        return self.tokens_per_side**2

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a video's frame."""
        return ((self.tokens_per_side + 1) // 2) ** 2

    @property
    def newlines(self) -> int:
        """Newlines behind a medium that has no map: one, or none where images are single tiles."""
        return 1 if self.tiling == "grid" else 0

    @property
    def resolutions(self) -> list[tuple[int, int]]:
        """The grids' (height, width) in pixels, in the order of transformers' `image_grid_pinpoints`."""
        sides = [tiles * self.tile_size for tiles in range(1, self.max_tiles_per_side + 1)]
        return [(height, width) for height in sides for width in sides]


STAGE_GRIDS = {
    "1": GridConfig(tiling="single"),
    "2a": GridConfig(max_tiles_per_side=2, cap_tiles=4),
    "2b": GridConfig(max_tiles_per_side=3, cap_tiles=5),
    "2c": GridConfig(max_tiles_per_side=4, cap_tiles=6),
    "3": GridConfig(max_tiles_per_side=6, cap_tiles=9),
    "4": GridConfig(max_tiles_per_side=6, cap_tiles=9),
}
"""Aquila-VL-2B's stages. Source: arXiv 2410.18558, the table of stages: its "resolution" row gives the grids, and its
"tokens per image", (M + 1) * 729 with the base tile, the caps. Stage 1's single tile without a newline is FlagScale's
"square" images and merge type "flat"."""


class Split(NamedTuple, Generic[Number]):
    """How images alone in their samples are cut into a grid: numbers for one image, or arrays over many."""

    columns: Number
    rows: Number
    """Tiles of the grid."""
    resized_width: Number
    resized_height: Number
    """Pixels of the image, resized into the grid."""
    left: Number
    top: Number
    """Pixels of padding before it."""
    first_map_row: Number
    first_map_column: Number
    """Where the part of the map that is kept begins."""
    map_rows: Number
    map_columns: Number
    """How much of the map is kept."""
    token_rows: Number
    token_columns: Number
    """The map's size once shrunk under the cap; that of what is kept where it fits."""


@dataclass(frozen=True)
class ImagePlan:
    """What becomes of one image or video."""

    grid: GridConfig
    kind: MediaKind
    width: int
    height: int
    tiles: int
    """Tiles that the tower sees: the base tile first, then the grid's, row-major; or a video's frames in order."""
    tokens: int
    split: Split[int] | None
    """The grid; None where no map is made."""

    @property
    def patch_rows(self) -> int:
        return self.tiles * self.grid.tokens_per_tile

    @property
    def is_shrunk(self) -> bool:
        split = self.split
        return split is not None and (split.token_rows, split.token_columns) != (split.map_rows, split.map_columns)

    @property
    def rectangles(self) -> list[tuple[int, int, int, int]]:
        """(left, top, right, bottom) in pixels of the grid's tiles on the padded image, in the tower's order."""
        if self.split is None:
            return []
        size = self.grid.tile_size
        corners = [(x * size, y * size) for y in range(self.split.rows) for x in range(self.split.columns)]
        return [(left, top, left + size, top + size) for left, top in corners]

    def map_patch_rows(self) -> Ints:
        """[map_rows, map_columns]: the image's patch row that each kept place of the map holds before it is shrunk."""
        assert self.split is not None, "an image without a grid has no map"
        side = self.grid.tokens_per_side
        y = self.split.first_map_row + np.arange(self.split.map_rows)[:, None]
        x = self.split.first_map_column + np.arange(self.split.map_columns)[None, :]
        tile = 1 + y // side * self.split.columns + x // side
        return tile * self.grid.tokens_per_tile + y % side * side + x % side


def token_counts(
    widths: ArrayLike, heights: ArrayLike, kind: MediaKind, grid: GridConfig, frames: ArrayLike = 1
) -> Ints:
    """Tokens that each image, or video of so many frames, costs the decoder; sizes in pixels, a million in a second."""
    width, height, frame = _sizes(widths, heights, frames)
    if kind == "video":
        return frame * grid.tokens_per_frame + grid.newlines
    if not _has_map(kind, grid):
        return np.full_like(width, grid.tokens_per_tile + grid.newlines)
    return _tokens(split_images(width, height, grid), grid)


def tile_counts(
    widths: ArrayLike, heights: ArrayLike, kind: MediaKind, grid: GridConfig, frames: ArrayLike = 1
) -> Ints:
    """Tiles of each image, or video of so many frames, that the tower sees."""
    width, height, frame = _sizes(widths, heights, frames)
    if kind == "video":
        return frame.copy()
    if not _has_map(kind, grid):
        return np.ones_like(width)
    columns, rows = _grids(width, height, grid)
    return 1 + columns * rows


def plan_image(width: int, height: int, kind: MediaKind, grid: GridConfig, frames: int = 1) -> ImagePlan:
    """What becomes of one image, or of a video of so many frames."""
    if _has_map(kind, grid):
        split = Split(*(int(numbers[0]) for numbers in split_images(width, height, grid)))
        return ImagePlan(grid, kind, width, height, 1 + split.columns * split.rows, _tokens(split, grid), split)
    tiles = tile_counts(width, height, kind, grid, frames)
    tokens = token_counts(width, height, kind, grid, frames)
    return ImagePlan(grid, kind, width, height, int(tiles[0]), int(tokens[0]), None)


def split_images(widths: ArrayLike, heights: ArrayLike, grid: GridConfig) -> Split[Ints]:
    """The grid of each image, were it alone in its sample."""
    assert grid.tiling == "grid", "a single tile is not split"
    width, height, _ = _sizes(widths, heights, 1)
    columns, rows = _grids(width, height, grid)
    resized_width, resized_height = _fit(width, height, columns * grid.tile_size, rows * grid.tile_size)
    first_row, first_column = _padded_lines(width, height, columns, rows, grid)
    map_rows = rows * grid.tokens_per_side - 2 * first_row
    map_columns = columns * grid.tokens_per_side - 2 * first_column
    return Split(
        columns,
        rows,
        resized_width,
        resized_height,
        (columns * grid.tile_size - resized_width) // 2,
        (rows * grid.tile_size - resized_height) // 2,
        first_row,
        first_column,
        map_rows,
        map_columns,
        *_under_cap(map_rows, map_columns, grid),
    )


def _has_map(kind: MediaKind, grid: GridConfig) -> bool:
    assert kind in get_args(MediaKind), kind
    return kind == "image" and grid.tiling == "grid"


def _tokens(split: Split[Number], grid: GridConfig) -> Number:
    return grid.tokens_per_tile + split.token_rows * (split.token_columns + 1)


def _sizes(widths: ArrayLike, heights: ArrayLike, frames: ArrayLike) -> tuple[Ints, Ints, Ints]:
    """The arguments as int64 arrays of one shape, refused where they cannot be sizes."""
    width, height, frame = np.broadcast_arrays(*(_whole(numbers) for numbers in (widths, heights, frames)))
    limits = ((width, "width", LONGEST_SIDE), (height, "height", LONGEST_SIDE), (frame, "frames", LONGEST_SIDE))
    for numbers, name, most in limits:
        bad = np.flatnonzero((numbers < 1) | (numbers > most))
        if bad.size:
            value, where = int(numbers.flat[bad[0]]), f"{name} of image {bad[0]}"
            raise DataError(where, value, f"is not between 1 and {most}", "drop the sample, or repair its metadata")
    return width, height, frame


def _whole(numbers: ArrayLike) -> Ints:
    array = np.atleast_1d(numbers)
    assert array.size == 0 or array.dtype.kind in "iu", f"sizes are whole numbers, not {array.dtype}"
    return array.astype(np.int64)


def _grids(width: Ints, height: Ints, grid: GridConfig) -> tuple[Ints, Ints]:
    """(columns, rows) of the grid that shows most of the image's pixels; of those, the one of least area.

    What a grid shows grows with the scale at which the image fits: the lesser of those for its width and its height.
    So of the grids that show most, one has both the fewest columns and the fewest rows: each number is found by itself,
    and no tie is left to break.
    """

    def shown(scale: NDArray[np.float64]) -> Ints:
        fitted = (width * scale).astype(np.int64) * (height * scale).astype(np.int64)
        return np.minimum(fitted, width * height)

    sides = [tiles * grid.tile_size for tiles in range(1, grid.max_tiles_per_side + 1)]
    most = shown(np.minimum(sides[-1] / width, sides[-1] / height))
    columns, rows = np.ones_like(width), np.ones_like(height)
    for side in sides[:-1]:
        columns += shown(side / width) < most
        rows += shown(side / height) < most
    return columns, rows


def _fit(width: Ints, height: Ints, grid_width: Ints, grid_height: Ints) -> tuple[Ints, Ints]:
    """(width, height) of the image resized into the grid, with the floats of the public code: a ceiling shows them."""
    by_width, by_height = grid_width / width, grid_height / height
    fitted_width = np.minimum(np.ceil(width * by_height).astype(np.int64), grid_width)
    fitted_height = np.minimum(np.ceil(height * by_width).astype(np.int64), grid_height)
    fills_width = by_width < by_height
    return np.where(fills_width, grid_width, fitted_width), np.where(fills_width, fitted_height, grid_height)


def _padded_lines(width: Ints, height: Ints, columns: Ints, rows: Ints, grid: GridConfig) -> tuple[Ints, Ints]:
    """(rows, columns) of the map that are dropped before what is kept; as many are dropped behind it."""
    map_rows, map_columns = rows * grid.tokens_per_side, columns * grid.tokens_per_side
    is_wider = width * map_rows > height * map_columns
    dropped_rows = (map_rows - height * map_columns // width) // 2
    dropped_columns = (map_columns - width * map_rows // height) // 2
    return np.where(is_wider, dropped_rows, 0), np.where(is_wider, 0, dropped_columns)


def _under_cap(map_rows: Ints, map_columns: Ints, grid: GridConfig) -> tuple[Ints, Ints]:
    """(rows, columns) of the map once it is shrunk, where it must be."""
    excess = np.sqrt(map_rows * map_columns / (grid.cap_tiles * grid.tokens_per_tile))
    divisor = np.where(excess > CAP_SLACK, excess, 1.0)
    return (map_rows // divisor).astype(np.int64), (map_columns // divisor).astype(np.int64)


def patch_rows(images: Tensor, patch_size: int) -> Tensor:
    """Images [images, channels, height, width] as patch rows [images * patches, channels * patch_size**2].

    A row holds one patch in the order (channel, y, x), that of a convolution's weight, so a patch embedding is one
    matrix product. The patches of an image follow one another row-major (left to right, then down), images one behind
    another.
    """
    images_, channels, height, width = images.shape
    assert height % patch_size == 0 and width % patch_size == 0, f"{height}x{width} holds no whole {patch_size}-patches"
    down, across = height // patch_size, width // patch_size
    cut = images.reshape(images_, channels, down, patch_size, across, patch_size)
    patches = images_ * down * across
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(patches, channels * patch_size * patch_size)
