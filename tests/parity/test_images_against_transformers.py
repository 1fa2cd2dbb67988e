"""Decoded pictures against transformers' `load_image`: colours, orientations, animations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import encoded, noise, png_chunk, png_of, turned_exif
from PIL import Image
from transformers.image_utils import load_image

from megavlm.data.images import decode_image, image_size, open_image
from megavlm.data.tile_images import Pixels

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def checked(content: bytes, folder: Path) -> Pixels:
    """The picture's pixels, equal to transformers' however it is given."""
    path = folder / "picture"
    path.write_bytes(content)
    expected = np.asarray(load_image(str(path)))
    for source in (content, path):
        found = decode_image(source, "picture")
        assert found.dtype == np.uint8 and np.array_equal(found, expected)
        assert image_size(source) == (found.shape[1], found.shape[0])
    assert np.array_equal(np.asarray(open_image(path).convert("RGB")), expected)
    return expected


@pytest.mark.parametrize(
    ("mode", "kinds"),
    [
        ("RGB", ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")),
        ("L", ("JPEG", "PNG", "TIFF")),
        ("1", ("PNG", "TIFF")),
        ("LA", ("PNG",)),
        ("RGBA", ("PNG", "WEBP", "TIFF")),
        ("P", ("PNG", "GIF", "BMP")),
        ("CMYK", ("JPEG", "TIFF")),
        ("YCbCr", ("JPEG",)),
        ("I;16", ("PNG", "TIFF")),
        ("F", ("TIFF",)),
    ],
)
@pytest.mark.parametrize(("width", "height"), [(37, 23), (1, 9), (400, 2)])
def test_colours(mode: str, kinds: tuple[str, ...], width: int, height: int, tmp_path: Path) -> None:
    for kind in kinds:
        assert checked(encoded(noise(width, height, mode), kind), tmp_path).shape == (height, width, 3), kind


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 250, 5))], ids=["one colour", "an alpha for each"])
def test_palettes_with_transparency_lose_it(transparency: Any, tmp_path: Path) -> None:
    palette = noise(30, 20).quantize(50)
    kept = checked(encoded(palette, "PNG", transparency=transparency), tmp_path)
    assert np.array_equal(kept, np.asarray(palette.convert("RGB")))


def test_alpha_is_dropped_and_what_lies_under_it_shows() -> None:
    clear = Image.new("RGBA", (2, 1), (200, 100, 50, 0))
    assert decode_image(encoded(clear, "PNG"), "picture").tolist() == [[[200, 100, 50]] * 2]


def test_sixteen_bits(tmp_path: Path) -> None:
    colour = b"\0" + bytes([1, 255, 2, 255, 254, 0])
    assert checked(png_of(1, 1, colour, depth=16, colour=2), tmp_path).tolist() == [[[1, 2, 254]]]
    grey = b"\0" + bytes([0, 77, 1, 0, 200, 0])
    assert checked(png_of(3, 1, grey, depth=16), tmp_path)[0, :, 0].tolist() == [77, 255, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientations(kind: str, orientation: int, tmp_path: Path) -> None:
    content = encoded(noise(30, 20), kind, exif=turned_exif(orientation))
    turned = orientation in (5, 6, 7, 8)
    assert checked(content, tmp_path).shape == ((30, 20, 3) if turned else (20, 30, 3))


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("kind", ["eXIf", "iTXt"])
def test_orientations_before_and_behind_the_pixels_of_a_png(kind: str, place: str, tmp_path: Path) -> None:
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP
    chunk = png_chunk(kind.encode(), turned_exif(6).removeprefix(b"Exif\0\0") if kind == "eXIf" else xmp)
    before, behind = (chunk, b"") if place == "before" else (b"", chunk)
    content = png_of(2, 1, bytes([0, 10, 200]), before=before, behind=behind)
    assert checked(content, tmp_path)[:, 0, 0].tolist() == [10, 200]


def test_orientation_in_xmp(tmp_path: Path) -> None:
    assert checked(encoded(noise(30, 20), "JPEG", xmp=XMP), tmp_path).shape == (30, 20, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames(kind: str, tmp_path: Path) -> None:
    first, *others = (noise(30, 20, seed=seed) for seed in range(3))
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(first, kind, save_all=True, append_images=others, **options)
    alone = encoded(first, kind, **options)
    assert np.array_equal(checked(content, tmp_path), checked(alone, tmp_path))
