"""Pictures from outside to pixels, within limits that are checked before anything is decoded.

A picture becomes what transformers' `load_image` makes of it:

- It stands upright, as its EXIF or XMP orientation says; LLaVA-NeXT's own loader leaves such pictures lying. Where
  that cannot be read, the picture stays as it is stored.
- Its colours are those of PIL's `convert("RGB")`: alpha is dropped and what lies under it shows, palettes are looked
  up, grey is repeated, CMYK is converted without its profile, colour of 16 bits keeps its high byte. Grey of more than
  8 bits is clipped to 0..255, so most of it is white: scale such pictures beforehand.
- Of several frames or pages the first is taken.

InfiMM's towers were fed pictures that were converted last, behind the resize: `open_image` leaves that to
`center_square`.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from megavlm.config import Config, require
from megavlm.data.tile_images import Pixels
from megavlm.errors import DataError, MegavlmError

# Damage that matters becomes an error here; what PIL merely remarks on would fill the logs of many workers. Set once,
# because `warnings.catch_warnings` around each picture is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is read. PIL knows more, among them formats that start other programs (EPS)."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)


@dataclass(frozen=True, kw_only=True)
class ImageLimits(Config):
    """What a picture or video from outside may cost; larger ones are refused by their header."""

    most_bytes: int = 256 * 2**20
    """Of the file."""
    most_pixels: int = 80_000_000
    """Of a picture: 0.9 GB while it is decoded and turned."""
    longest_side: int = 16_384
    """Pixels. One of several pictures is padded to the square of its long side: 0.8 GB here, and PIL's copy of 1.1 GB;
    the 65,535 pixels that a JPEG can have would take 30."""
    largest_aspect: int = 1000
    """Long side over short side. InfiMM scales the short side to a tile: 0.5 GB here at 336 pixels."""
    most_frames: int = 10_000
    """Of an animation, or files in a folder of frames."""
    most_video_pixels: int = 300_000_000
    """Of the frames that are taken, together: 0.9 GB; 32 of 3840x2160 have 265 million."""

    def check(self) -> None:
        for field in fields(self):
            require(getattr(self, field.name) >= 1, self, field.name, "is below 1", "use 1 or more")


DEFAULT_LIMITS = ImageLimits()


def decode_image(source: bytes | Path, where: str, limits: ImageLimits = DEFAULT_LIMITS) -> Pixels:
    """The picture as RGB, uint8 [height, width, 3]; `where` names it in errors."""
    with opened(source, where, limits) as image:
        return rgb_pixels(upright(image))


def image_size(source: bytes | Path, where: str = "image", limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """(width, height) of the upright picture, from its header."""
    with opened(source, where, limits) as image:
        width, height = image.size
        if image.format == "TIFF":  # PIL tells its upright size
            return width, height
        exif_of = None
        if image.format == "PNG" and not has_metadata_behind_pixels(image.fp):
            exif_of = Image.Image.getexif  # PNG's own decodes the pixels to look behind them
        return (height, width) if orientation(image, exif_of) in _SWAPS_SIDES else (width, height)


def open_image(path: str | Path, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """The decoded, upright picture of a file, in the colours that it is stored in."""
    with opened(Path(path), "image", limits) as image:
        # A copy, because a picture of PIL keeps to its file.
        return upright(image).copy()


def upright(image: Image.Image) -> Image.Image:
    """The decoded picture, turned as its orientation says."""
    image.load()
    turn = _TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def rgb_pixels(image: Image.Image) -> Pixels:
    """A decoded picture's uint8 [height, width, 3]."""
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def orientation(image: Image.Image, exif_of: Callable[[Any], Image.Exif] | None = None) -> int:
    """The EXIF number from 1 to 8; 1, upright, where there is none or it cannot be read."""
    try:
        number = (exif_of or type(image).getexif)(image).get(_ORIENTATION, 1)
    except Exception:  # hostile metadata make PIL raise nearly anything
        return 1
    return number if isinstance(number, int) else 1


@contextmanager
def opened(source: bytes | Path, where: str, limits: ImageLimits) -> Iterator[Image.Image]:
    """A picture of which the header is read and within the limits; what PIL raises inside ends as a DataError."""
    name = source_name(source)
    try:
        with stream_of(source, where, limits) as stream, Image.open(stream, formats=_formats()) as image:
            _check_size(image, where, name, limits)
            yield image
    except MegavlmError:
        raise
    except Image.DecompressionBombError:  # PIL's own limit, from the header too
        raise _too_many_pixels(where, name, limits) from None
    except UnidentifiedImageError:
        raise DataError(where, name, "is no picture that can be read", "use for example JPEG or PNG") from None
    except Exception as error:  # hostile files make PIL raise nearly anything
        problem = f"cannot be read: {_first_line(error)}"
        raise DataError(where, name, problem, "check the file, or copy it again") from None


def stream_of(source: bytes | Path, where: str, limits: ImageLimits) -> IO[bytes]:
    """The bytes of a source that is not too long; a pipe, which would wait for ever, is refused."""
    stream: IO[bytes]
    if isinstance(source, bytes):
        size, stream = len(source), io.BytesIO(source)
    else:
        try:
            found = os.stat(source)
            if not stat.S_ISREG(found.st_mode):
                raise DataError(where, str(source), "cannot be read: it is no file", "give the path of a file")
            size, stream = found.st_size, open(source, "rb")  # noqa: SIM115 - the caller closes it
        except FileNotFoundError:
            raise DataError(where, str(source), "there is no such file", "check the path") from None
        except OSError as error:
            raise DataError(where, str(source), f"cannot be read: {error.strerror}", "check its permissions") from None
    if size > limits.most_bytes:
        stream.close()
        raise DataError(where, source_name(source), f"has more than {limits.most_bytes} bytes", "compress it")
    return stream


def source_name(source: bytes | Path) -> str:
    """What an error calls a source."""
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those that this installation of PIL knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(image: Image.Image, where: str, name: str, limits: ImageLimits) -> None:
    short, long = sorted(image.size)
    if short < 1:
        raise DataError(where, name, f"has {image.width}x{image.height} pixels", "check the file")
    if short * long > limits.most_pixels:
        raise _too_many_pixels(where, name, limits)
    if long > limits.longest_side:
        problem = f"is {image.width}x{image.height}, longer than {limits.longest_side} pixels"
        raise DataError(where, name, problem, "scale it down, or cut it")
    if long > short * limits.largest_aspect:
        problem = f"is {image.width}x{image.height}, one side more than {limits.largest_aspect} times the other"
        raise DataError(where, name, problem, "cut it")


def _too_many_pixels(where: str, name: str, limits: ImageLimits) -> DataError:
    return DataError(where, name, f"has more than {limits.most_pixels} pixels", "scale it down")


def has_metadata_behind_pixels(png: IO[bytes]) -> bool:
    """Whether PIL would find some there; by the headers of the file's chunks."""
    has_pixels = False
    png.seek(8)
    while len(header := png.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        has_pixels |= kind == b"IDAT"
        if has_pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
            return True
        png.seek(length + 4, os.SEEK_CUR)
    return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def clip_pixels(image: Image.Image, size: int) -> Tensor:
    """The middle square of a picture, [3, size, size], normalised as CLIP's training did."""
    pixels = torch.from_numpy(np.array(center_square(image, size))).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


def center_square(image: Image.Image, size: int) -> Image.Image:
    """Shortest side to `size` (bicubic), then the middle of the long one, then RGB.

    The conversion comes last, as in the original preprocessing: a palette is resized without interpolation, and
    transparent pixels count less in their neighbourhood.
    """
    width, height = center_size(image.width, image.height, size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size)).convert("RGB")


def center_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) of a picture whose shortest side is scaled to `size`, before the middle is cut out."""
    return (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
