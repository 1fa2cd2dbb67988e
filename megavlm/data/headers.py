"""What the first bytes of a picture file tell: its format and its size. Nothing is decoded here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megavlm.data.images import image_size
from megavlm.errors import DataError

FORMATS = ("jpg", "png", "webp", "gif", "bmp", "tif")
"""The endings that picture files get in shards. An index stores a format as its place in this list: add at the end."""
MOST_PICTURE_BYTES = 64 * 2**20
"""Larger picture files are refused by their size, before any of it is read."""


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
    """The header of a picture file; ValueError with the reason where it is refused."""
    if len(data) > MOST_PICTURE_BYTES:
        raise ValueError("a picture file is too large")
    kind = sniff(data)
    if kind is None:
        raise ValueError("a picture file is empty" if not data else "a picture file is of no known format")
    try:
        return Header(kind, *image_size(data))
    except DataError as error:
        raise ValueError(f"a picture {_in_general(error.problem)}") from None


def _in_general(problem: str) -> str:
    """What is wrong, without this one picture's numbers: reports count by it."""
    said = problem.partition(":")[0]
    return re.sub(r"is \d+x\d+, ", "is ", re.sub(r"has \d+x\d+ pixels", "has no pixels", said))
