"""Formats and sizes of picture files, told by their first bytes."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from random_samples import FORMATS, picture_file

from megavlm.data.headers import MOST_PICTURE_BYTES, read_header, sniff

ENDINGS = dict(zip(FORMATS, ("jpg", "png", "webp", "gif", "bmp", "tif"), strict=True))


def png_header(width: int, height: int) -> bytes:
    """A PNG that states a size and has no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [struct.pack(">I", len(chunk) - 4), chunk, struct.pack(">I", zlib.crc32(chunk))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_picture_as_shown(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, kind, exif=exif)
    header = read_header(buffer.getvalue())
    shown = ImageOps.exif_transpose(Image.open(buffer))
    assert (header.format, header.width, header.height) == (ENDINGS[kind], *shown.size)


def test_formats_are_told_by_their_bytes() -> None:
    rng = np.random.default_rng(0)
    for kind in FORMATS:
        data = picture_file(rng, kind, (7, 9))
        header = read_header(data)
        assert (header.format, header.width, header.height) == (sniff(data), 7, 9) == (ENDINGS[kind], 7, 9)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"<svg/>", "no known format"),
        (b"RIFF0000WAVE", "no known format"),
        (b"\xff\xd8\xff", "is no picture that can be read"),
        (png_header(13_000, 13_000), "a picture has more than 80000000 pixels$"),
        (png_header(50_000, 50_000), "more than 80000000 pixels"),
        (png_header(20_000, 1), "a picture is longer than 16384 pixels$"),
        (png_header(0, 5), "is no picture|has no pixels|cannot be read"),
        (b"\xff\xd8\xff" + bytes(MOST_PICTURE_BYTES), "too large"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(data: bytes, reason: str) -> None:
    tracemalloc.start()
    with pytest.raises(ValueError, match=reason):
        read_header(data)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_cut_file_gives_its_size_or_a_reason() -> None:
    data = picture_file(np.random.default_rng(1), "JPEG", (30, 20))
    results: list[tuple[int, int] | None] = []
    for length in range(len(data)):
        try:
            header = read_header(data[:length])
            results.append((header.width, header.height))
        except ValueError:
            results.append(None)
    assert set(results) == {None, (30, 20)}  # None also within the tables behind the size
    assert set(results[data.index(b"\xff\xda") + 20 :]) == {(30, 20)}


def test_no_pixels_are_decoded() -> None:
    """A PNG's notes may stand behind its pixels: to look there would decode it."""
    pixels = zlib.compress(bytes(8_000 * 8_001))
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 8_000, 8_000, 8, 0, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for body in (chunk, b"IDAT" + pixels, b"IEND"):
        parts.append(struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)))
    data = b"".join(parts)
    tracemalloc.start()
    assert read_header(data).width == 8_000
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
