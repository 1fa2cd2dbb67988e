"""Picture files as bytes, sound and hostile ones."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

PNG_START = b"\x89PNG\r\n\x1a\n"
ORIENTATION = 0x0112


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned_exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif.tobytes()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(
    width: int, height: int, values: bytes, depth: int = 8, colour: int = 0, before: bytes = b"", behind: bytes = b""
) -> bytes:
    """A PNG of these rows, with other chunks before and behind the pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(values, 9))
    return PNG_START + header + before + pixels + behind + png_chunk(b"IEND", b"")


def huge_png(side: int = 13_000) -> bytes:
    """A sound picture of this side in black and white: 21 KB for 13,000 pixels."""
    row = bytes(1 + (side + 7) // 8)
    return png_of(side, side, row * side, depth=1)
