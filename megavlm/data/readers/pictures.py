"""The bytes of pictures from folders, data URLs and parquet cells, none of which is trusted.

A picture is taken when its header says what it is and how large; decoding is for later. A name that leads out of the
folder of pictures, by `..`, as an absolute path or through a link, is refused.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from megavlm.data.headers import MOST_PICTURE_BYTES, read_header
from megavlm.data.readers.base import Bad, Context, kind_of
from megavlm.data.sample import Picture

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def image_of(value: Any, context: Context) -> Picture:
    """A picture, given as bytes, as a parquet cell (`{bytes, path}`), as a data URL, or by its name in the folder."""
    return Picture((_bytes_of(value, context),))


def images_of(value: Any, context: Context) -> list[Picture]:
    """The pictures of a field that holds none, one or a list."""
    values = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    return [image_of(item, context) for item in values if item is not None]


def video_of(value: Any, context: Context) -> Picture:
    """A video, given as the name of a folder of frames, or as the list of its frames."""
    names = value if isinstance(value, list) else _frames_in(value, context)
    return Picture(tuple(_bytes_of(name, context) for name in names), is_video=True)


def checked_picture(data: bytes, name: str, context: Context) -> bytes:
    """The bytes, if their header is a picture's, and not of too many pixels."""
    context.take(len(data))
    if not data:
        raise Bad(f"picture empty: {name}")
    try:
        header = read_header(data)
    except ValueError as error:
        raise Bad(f"picture unusable ({error}): {name}") from None
    if header.width * header.height == 0:
        raise Bad(f"picture unusable (it has no pixels): {name}")
    return data


def path_in(folder: Path, name: str) -> Path:
    """Where a name of the data leads, if that lies within the folder."""
    root = os.path.realpath(folder)
    try:
        path = os.path.realpath(os.path.join(root, name))
    except ValueError:  # a NUL in the name
        raise Bad(f"picture missing: {name!r} is no file name") from None
    if os.path.commonpath([root, path]) != root:
        raise Bad(f"path leaves the folder of pictures: {name}")
    return Path(path)


def read_within(folder: Path, name: str, most_bytes: int) -> bytes:
    """The content of a regular file within the folder; its size is looked at before it is read."""
    path = path_in(folder, name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not make us wait
    except FileNotFoundError:
        raise Bad(f"picture missing: {name}") from None
    except (OSError, UnicodeEncodeError) as error:
        raise Bad(f"picture unreadable: {name} ({getattr(error, 'strerror', 'no file name')})") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Bad(f"picture unreadable: {name} is no file")
        if found.st_size > most_bytes:
            raise Bad(f"picture too large: {name} has {found.st_size} bytes")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most_bytes)
    except OSError as error:
        raise Bad(f"picture unreadable: {name} ({error.strerror})") from None
    finally:
        os.close(descriptor)


def _bytes_of(value: Any, context: Context) -> bytes:
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return checked_picture(value, "a picture in the record", context)
    if not isinstance(value, str) or not value:
        raise Bad(f"wrong type: a picture is {kind_of(value) if value != '' else 'empty text'}, not a name or bytes")
    if value[:5].lower() == "data:":
        return checked_picture(_from_data_url(value, context), "a data URL", context)
    if value[:7].lower() == "file://":
        value = unquote(urlsplit(value).path)
    elif "://" in value[:12]:
        raise Bad(f"picture not local: {value[:200]}")
    data = read_within(context.folder, value, MOST_PICTURE_BYTES)
    return checked_picture(data, value, context)


def _from_data_url(url: str, context: Context) -> bytes:
    most = MOST_PICTURE_BYTES
    head, comma, body = url.partition(",")
    if not comma:
        raise Bad("data URL without content: it has no comma")
    if len(body) > 3 * most:  # no encoding takes more than three characters a byte
        raise Bad(f"picture too large: a data URL of {len(body)} characters")
    try:
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
    except (binascii.Error, ValueError):
        raise Bad("data URL damaged: its base64 does not decode") from None


def _frames_in(value: Any, context: Context) -> list[str]:
    """The names of the frames in a folder, in the order of their names."""
    if not isinstance(value, str) or not value:
        raise Bad(f"wrong type: a video is {kind_of(value)}, not a folder of frames or a list of them")
    folder = path_in(context.folder, value)
    if not folder.is_dir():
        if folder.is_file():
            raise Bad(f"video is no folder of frames: {value}; take its frames out first")
        raise Bad(f"video missing: {value}")
    try:
        return [f"{value}/{name}" for name in pictures_among(os.listdir(folder))]
    except OSError as error:
        raise Bad(f"video unreadable: {value} ({error.strerror})") from None


def pictures_among(names: Iterable[str]) -> list[str]:
    """The names of pictures, sorted, numbers by their value (frame 10 after frame 9)."""
    return sorted((name for name in names if name.lower().endswith(SUFFIXES)), key=_natural)


def _natural(name: str) -> list[tuple[int, int, str]]:
    pieces: list[tuple[int, int, str]] = []
    digits = ""
    for char in [*name, ""]:
        if char.isdecimal() and char.isascii():
            digits += char
            continue
        if digits:
            pieces.append((0, int(digits[:4000]), digits))
            digits = ""
        if char:
            pieces.append((1, 0, char))
    return pieces
