"""Pictures of a preview as SVG: what the tower sees of each, drawn over the picture itself, in a page of its own."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from PIL import Image

from megavlm.data.images import decode_image
from megavlm.data.preview import ShownPicture
from megavlm.errors import DataError
from megavlm.tiles import ImagePlan, Split

WIDEST, HIGHEST = 440, 300
"""Pixels of the page that a picture takes at most."""
SMALLEST, LARGEST = 56, 180
"""Pixels of a tile that stands by itself at least, and of any tile at most."""
SMALL_ENOUGH = 160
"""Pixels of the longer side up to which pictures are kept to the last bit."""
FRAMES_SHOWN = 8
QUALITY = 80
"""Of JPEG."""


class Shown(NamedTuple):
    """A picture for a page."""

    uri: str
    """data:..., empty where the picture cannot be shown."""
    width: int
    height: int
    """Of the file, upright."""
    problem: str = ""


def shown_file(file: bytes, longest: int) -> Shown:
    """A picture's file, scaled down for a page."""
    try:
        pixels = decode_image(file, "picture")
    except DataError as error:
        return Shown("", 1, 1, error.problem)
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if max(image.size) <= SMALL_ENOUGH:
        image.save(stream, "PNG", optimize=True)
        kind = "png"
    else:
        image.save(stream, "JPEG", quality=QUALITY)
        kind = "jpeg"
    return Shown(f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}", width, height)


def figure_of(picture: ShownPicture, anchor: str, number: int, longest: int) -> str:
    """A picture with its tiles; `anchor` is its id in the page, `number` counts the pictures of its document."""
    plan = picture.planned.plan
    shown = [shown_file(file, longest) for file in picture.files[:FRAMES_SHOWN]]
    problem = "its files cannot be read" if not shown else next((one.problem for one in shown if one.problem), "")
    name = f"Picture {number}"
    if problem:
        drawn, said = f'<p class="bad">{escape(problem)}</p>', "blank in the row"
    elif picture.is_attended:
        drawn, said = _middle_square(shown[0], anchor, name), "its middle square"
    elif plan.kind == "video":
        drawn, said = _frames(shown, plan, anchor, name), f"{_counted(plan.tiles, 'frame')}, each squeezed to a tile"
    elif plan.kind == "one_of_several":
        drawn, said = _squared(shown[0], anchor, name), "one of several: padded to a square, one tile"
    elif plan.split is None:
        drawn, said = _squeezed(shown[0], anchor, name), "squeezed to one tile"
    else:
        drawn, said = _grid(shown[0], plan, plan.split, anchor, name), _said_grid(plan, plan.split)
    size = _by(plan.width, plan.height)
    caption = f"<b>{name}</b> {size}: {said}; <b>{_counted(picture.tokens, 'token')}</b>"
    return f'<figure id="{anchor}"><div class="cut">{drawn}</div><figcaption>{caption}</figcaption></figure>'


def _by(width: int, height: int) -> str:
    return f"{width} \N{MULTIPLICATION SIGN} {height}"


def _said_grid(plan: ImagePlan, split: Split[int]) -> str:
    tiles, kept = _by(split.columns, split.rows), _by(split.map_columns, split.map_rows)
    shrunk = f", shrunk to {_by(split.token_columns, split.token_rows)}" if plan.is_shrunk else ""
    return f"base tile and {tiles} tiles, {kept} places kept{shrunk}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _svg(width: float, height: float, scale: float, label: str, inner: str, caption: str = "") -> str:
    """A drawing in units of its own, `scale` pixels of the page each."""
    size = f'width="{max(1, round(width * scale))}" height="{max(1, round(height * scale))}"'
    svg = f'<svg role="img" aria-label="{escape(label)}" {size} viewBox="0 0 {width} {height}">{inner}</svg>'
    return f'<span class="drawing">{svg}<small>{caption}</small></span>' if caption else svg


def _definition(shown: Shown, name: str) -> str:
    """The picture as a square of one unit, for others to use at any size; it stands in the page once."""
    image = f'<image id="{name}" width="1" height="1" preserveAspectRatio="none" href="{shown.uri}"/>'
    return f"<defs>{image}</defs>"


def _use(name: str, left: float, top: float, width: float, height: float) -> str:
    return f'<use href="#{name}" transform="translate({left} {top}) scale({width} {height})"/>'


def _grid(shown: Shown, plan: ImagePlan, split: Split[int], anchor: str, name: str) -> str:
    tile = plan.grid.tile_size
    width, height = split.columns * tile, split.rows * tile
    scale = min(WIDEST / width, HIGHEST / height, LARGEST / tile)
    image, base_scale = f"i-{anchor}", max(scale, SMALLEST / tile)
    drawn = _definition(shown, image) + _use(image, 0, 0, tile, tile) + _number(1, 0, 0, base_scale)
    base = _svg(tile, tile, base_scale, f"{name}, base tile", drawn, "base tile")
    layers = [
        f'<rect class="void" width="{width}" height="{height}"/>',
        f'<rect class="hatch" width="{width}" height="{height}"/>',
        _use(image, split.left, split.top, split.resized_width, split.resized_height),
        _kept(plan, split, width, height),
        _lines(split, tile, width, height),
        *(_number(number, left, top, scale) for number, (left, top, _, _) in enumerate(plan.rectangles, 2)),
    ]
    label = f"{name}, {split.columns} by {split.rows} tiles"
    return base + _svg(width, height, scale, label, "".join(layers), f"{_by(split.columns, split.rows)} tiles")


def _kept(plan: ImagePlan, split: Split[int], width: int, height: int) -> str:
    """What of the map is kept, outlined; the rest dimmed."""
    if not split.map_rows or not split.map_columns:
        return f'<rect class="dropped" width="{width}" height="{height}"/>'
    left, right = _span(plan, split.first_map_column, split.map_columns)
    top, bottom = _span(plan, split.first_map_row, split.map_rows)
    outline = f"M{left} {top}H{right}V{bottom}H{left}Z"
    return f'<path class="dropped" d="M0 0H{width}V{height}H0Z{outline}"/><path class="kept" d="{outline}"/>'


def _span(plan: ImagePlan, first: int, count: int) -> tuple[int, int]:
    """From where to where, in pixels of the padded picture, so many places of the map reach."""
    side, patch, tile = plan.grid.tokens_per_side, plan.grid.patch_size, plan.grid.tile_size
    last = first + count - 1
    return first // side * tile + first % side * patch, last // side * tile + last % side * patch + patch


def _lines(split: Split[int], tile: int, width: int, height: int) -> str:
    down = "".join(f"M{tile * column} 0V{height}" for column in range(1, split.columns))
    across = "".join(f"M0 {tile * row}H{width}" for row in range(1, split.rows))
    path = f"M0 0H{width}V{height}H0Z{down}{across}"
    return f'<path class="under" d="{path}"/><path class="over" d="{path}"/>'


def _number(number: int, left: int, top: int, scale: float) -> str:
    """A tile's place in the tower's order, in its corner."""
    size = round(12 / scale, 1)
    return f'<text x="{left + size * 0.4:.1f}" y="{top + size * 1.15:.1f}" font-size="{size}">{number}</text>'


def _squeezed(shown: Shown, anchor: str, name: str) -> str:
    inner = _definition(shown, f"i-{anchor}") + _use(f"i-{anchor}", 0, 0, 1, 1)
    return _svg(1, 1, HIGHEST / 2, f"{name}, squeezed", inner)


def _squared(shown: Shown, anchor: str, name: str) -> str:
    side = max(shown.width, shown.height)
    left, top = (side - shown.width) // 2, (side - shown.height) // 2
    image = _use(f"i-{anchor}", left, top, shown.width, shown.height)
    inner = f'{_definition(shown, f"i-{anchor}")}<rect class="grey" width="{side}" height="{side}"/>{image}'
    return _svg(side, side, HIGHEST / 2 / side, f"{name}, padded to a square", inner + _lines_around(side, side))


def _lines_around(width: float, height: float) -> str:
    path = f"M0 0H{width}V{height}H0Z"
    return f'<path class="under" d="{path}"/><path class="over" d="{path}"/>'


def _frames(shown: Sequence[Shown], plan: ImagePlan, anchor: str, name: str) -> str:
    drawn = []
    for place, frame in enumerate(shown):
        image = f"i-{anchor}-{place}"
        inner = _definition(frame, image) + _use(image, 0, 0, 1, 1)
        drawn.append(_svg(1, 1, HIGHEST / 3, f"{name}, frame {place + 1}", inner))
    more = plan.tiles - len(shown)
    return "".join(drawn) + (f"<small>and {_counted(more, 'frame')} more</small>" if more > 0 else "")


def _middle_square(shown: Shown, anchor: str, name: str) -> str:
    width, height = shown.width, shown.height
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = f"M{left} {top}H{left + side}V{top + side}H{left}Z"
    layers = [
        _definition(shown, f"i-{anchor}"),
        _use(f"i-{anchor}", 0, 0, width, height),
        f'<path class="dropped" d="M0 0H{width}V{height}H0Z{square}"/><path class="kept" d="{square}"/>',
    ]
    return _svg(width, height, min(1.0, HIGHEST / 2 / height, WIDEST / 2 / width) if side else 1, name, "".join(layers))
