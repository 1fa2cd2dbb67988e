"""Pictures to pixels: sizes, the order of the steps, and files that are no pictures."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megavlm.data.images import CLIP_MEAN, CLIP_STD, center_square, clip_pixels, open_image
from megavlm.errors import DataError


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    draw = np.random.default_rng(1)
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    return Image.fromarray(draw.integers(0, 256, (height, width, *channels), dtype=np.uint8), mode)


@pytest.mark.parametrize("width, height", [(56, 56), (100, 70), (70, 100), (57, 56), (20, 30), (3, 400)])
def test_every_picture_becomes_a_square(width: int, height: int) -> None:
    square = center_square(noise(width, height), 56)
    assert square.size == (56, 56) and square.mode == "RGB"


def test_the_middle_is_kept() -> None:
    wide = noise(86, 56)
    assert np.array_equal(np.array(center_square(wide, 56)), np.array(wide)[:, 15:71])
    tall = noise(56, 91)  # half a pixel goes to the even side
    assert np.array_equal(np.array(center_square(tall, 56)), np.array(tall)[18:74])


def test_the_long_side_is_cut_to_an_integer() -> None:
    resized = noise(100, 70).resize((int(56 * 100 / 70), 56), Image.Resampling.BICUBIC)
    assert resized.width == 80
    expected = resized.crop((12, 0, 68, 56))
    assert np.array_equal(np.array(center_square(noise(100, 70), 56)), np.array(expected))


def test_colours_are_converted_last() -> None:
    clear = noise(80, 80, "RGBA")
    assert not np.array_equal(np.array(center_square(clear, 56)), np.array(center_square(clear.convert("RGB"), 56)))
    palette = noise(80, 80).quantize(8)
    colours = {tuple(color) for color in np.array(center_square(palette, 56)).reshape(-1, 3).tolist()}
    assert len(colours) <= 8, "a palette is not interpolated"


def test_pixels_are_normalised() -> None:
    grey = clip_pixels(Image.new("L", (60, 60), 51), 28)
    assert grey.shape == (3, 28, 28) and grey.dtype == torch.float32
    for channel, mean, std in zip(grey, CLIP_MEAN, CLIP_STD, strict=True):
        torch.testing.assert_close(channel, torch.full((28, 28), (0.2 - mean) / std))


def test_channels_keep_their_place() -> None:
    red = clip_pixels(Image.new("RGB", (28, 28), (255, 0, 0)), 28)[:, 0, 0]
    torch.testing.assert_close(red, (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD))


@pytest.mark.parametrize("side", [9000, 20000])
def test_a_huge_picture_is_refused_by_its_header(side: int, tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    end = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    path = tmp_path / "huge.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + end)
    with pytest.raises(DataError, match=r"huge.png.*has more than 80000000 pixels; scale it down"):
        open_image(path)


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("hello")
    with pytest.raises(DataError, match=r"text.png.*is no picture that can be read; use for example JPEG or PNG"):
        open_image(text)
    with pytest.raises(DataError, match=r"there is no such file; check the path"):
        open_image(tmp_path / "none.png")
    with pytest.raises(DataError, match=r"cannot be read"):
        open_image(tmp_path)
