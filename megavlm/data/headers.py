"""What the first bytes of a picture file tell: its format and its size. Nothing is decoded here."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

from PIL import Image

FORMATS = ("jpg", "png", "webp", "gif", "bmp", "tif")
"""The endings that picture files get in shards. An index stores a format as its place in this list: add at the end."""
MOST_PIXELS = 80_000_000
"""Larger pictures are refused by their header, before any of it is decoded."""
MOST_PICTURE_BYTES = 64 * 2**20
"""Larger picture files are refused by their size, before any of it is read."""

_PIL_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}
_ORIENTATION, _TIFF_WIDTH, _TIFF_HEIGHT = 0x0112, 0x0100, 0x0101
_TURNED = (5, 6, 7, 8)
"""Orientations in which a picture is shown with its sides swapped."""


@dataclass(frozen=True)
class Header:
    """A picture file's format and its size in pixels, as shown: turned where its EXIF orientation says so."""

    format: str
    width: int
    height: int


def sniff(data: bytes) -> str | None:
    """The format by its first bytes, whatever the file's name says; None where it is none of FORMATS."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if data.startswith(b"BM"):
        return "bmp"
    return "tif" if data.startswith((b"II*\x00", b"MM\x00*")) else None


def read_header(data: bytes) -> Header:
    """The header of a picture file; ValueError with the reason where it is refused.

    An orientation counts where it stands before the pixels; in a PNG it may stand behind them, and is overlooked.
    """
    if len(data) > MOST_PICTURE_BYTES:
        raise ValueError("a picture file is too large")
    kind = sniff(data)
    if kind is None:
        raise ValueError("a picture file is empty" if not data else "a picture file is of no known format")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            with Image.open(io.BytesIO(data), formats=[_PIL_FORMATS[kind]]) as image:
                (width, height), orientation = _stored_size(image, kind), _orientation(image, kind)
    except Image.DecompressionBombError:
        raise ValueError("a picture has too many pixels") from None
    except Exception:  # PIL's parsers raise whatever their damaged input leads to
        raise ValueError("a picture file's header is damaged") from None
    if width * height > MOST_PIXELS:
        raise ValueError("a picture has too many pixels")
    if orientation in _TURNED:
        width, height = height, width
    return Header(kind, width, height)


def _stored_size(image: Image.Image, kind: str) -> tuple[int, int]:
    if kind == "tif":  # PIL turns the size of these by itself, depending on its version
        tags = image.getexif()
        return int(tags[_TIFF_WIDTH]), int(tags[_TIFF_HEIGHT])
    return image.size


def _orientation(image: Image.Image, kind: str) -> int:
    if kind == "tif":
        return image.getexif().get(_ORIENTATION, 1)
    block = image.info.get("exif")  # `getexif` would decode a PNG whole to look behind its pixels
    if not block:
        return 1
    exif = Image.Exif()
    try:
        exif.load(block)
        return exif.get(_ORIENTATION, 1)
    except Exception:  # a damaged block of notes is no damaged picture
        return 1
