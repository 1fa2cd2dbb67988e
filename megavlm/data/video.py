"""Videos to frames: which frames are taken, and their pixels.

A video is a folder of frame pictures, a list of them, or an animated picture (GIF, WebP, PNG). Film containers (MP4,
WebM, AVI, ...) are refused with what to do: there is no decoder for them here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from megavlm.config import Config, require
from megavlm.data.images import (
    DEFAULT_LIMITS,
    ImageLimits,
    decode_image,
    image_size,
    opened,
    rgb_pixels,
    source_name,
    stream_of,
    upright,
)
from megavlm.data.tile_images import Pixels
from megavlm.errors import DataError, UnavailableError

VideoSource = bytes | Path | Sequence[bytes | Path]
"""An animated picture, a folder of frames or an animated picture's file, or frames."""

_STILL_BRANDS = (b"avi", b"hei", b"hev", b"mif", b"msf")
"""Of the same container as MP4, but pictures: AVIF and HEIF."""
_CONTAINERS = (b"\x1aE\xdf\xa3", b"FLV", b"OggS", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"0&\xb2u", b"G@")
"""Matroska and WebM, Flash, Ogg, MPEG program and elementary streams, Windows Media, MPEG transport streams."""
_DEFAULT_DELAY = 100
"""Milliseconds between an animation's frames where it names none: browsers' choice."""


@dataclass(frozen=True, kw_only=True)
class FrameSampling(Config):
    """Which frames of a video are taken. Source: LLaVA-NeXT's training scripts."""

    frames_per_second: float = 1.0
    """How many are taken of a second."""
    frames_upbound: int = 32
    """If that makes more than so many, so many are taken instead, evenly over the whole video."""

    def check(self) -> None:
        require(self.frames_per_second > 0, self, "frames_per_second", "is not positive", "use 1.0")
        require(self.frames_upbound >= 1, self, "frames_upbound", "is below 1", "use 32")


DEFAULT_SAMPLING = FrameSampling()


class VideoInfo(NamedTuple):
    """What becomes of a video, known without decoding all of it."""

    width: int
    height: int
    """Pixels of its frames."""
    frames: list[int]
    """The frames that are taken, counted from 0."""


def sample_frames(frames: int, frames_per_second: float, sampling: FrameSampling = DEFAULT_SAMPLING) -> list[int]:
    """The frames to take of so many, counted from 0, with LLaVA-NeXT's rounding."""
    assert frames >= 1 and frames_per_second > 0, (frames, frames_per_second)
    taken = range(0, frames, max(1, round(frames_per_second / sampling.frames_per_second)))
    if len(taken) > sampling.frames_upbound:
        return [int(place) for place in np.linspace(0, frames - 1, sampling.frames_upbound, dtype=int)]
    return list(taken)


def video_info(
    source: VideoSource,
    where: str,
    frames_per_second: float | None = None,
    sampling: FrameSampling = DEFAULT_SAMPLING,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> VideoInfo:
    """The size of a video's frames, and which of them are taken.

    `frames_per_second` is that of the source. None: an animation's own, by the delay of its first frame; of frames in
    a folder or list, which data sets have sampled already, each is taken up to the limit of their number.
    """
    return _look_at(source, where, frames_per_second, sampling, limits)[0]


def decode_video(
    source: VideoSource,
    where: str,
    frames_per_second: float | None = None,
    sampling: FrameSampling = DEFAULT_SAMPLING,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Pixels:
    """The frames that `video_info` says, as RGB: uint8 [frames, height, width, 3]."""
    (width, height, frames), files = _look_at(source, where, frames_per_second, sampling, limits)
    pixels = np.empty((len(frames), height, width, 3), np.uint8)
    if files is None:
        assert isinstance(source, bytes | Path)
        with opened(source, where, limits) as image:
            for place, frame in enumerate(frames):
                image.seek(frame)
                pixels[place] = rgb_pixels(upright(image))
        return pixels
    for place, frame in enumerate(frames):
        found = decode_image(files[frame], f"{where}: frame {frame}", limits)
        if found.shape != pixels.shape[1:]:
            size, name = f"{found.shape[1]}x{found.shape[0]}", source_name(files[frame])
            problem = f"is {size} where others are {width}x{height}"
            raise DataError(f"{where}: frame {frame}", name, problem, "scale all frames to one size")
        pixels[place] = found
    return pixels


def _look_at(
    source: VideoSource, where: str, frames_per_second: float | None, sampling: FrameSampling, limits: ImageLimits
) -> tuple[VideoInfo, Sequence[bytes | Path] | None]:
    """What becomes of a video; and the files of its frames, where it is no animation."""
    files = _frame_files(source, where, limits)
    if files is not None:
        frames = sample_frames(len(files), frames_per_second or sampling.frames_per_second, sampling)
        width, height = image_size(files[frames[0]], f"{where}: frame {frames[0]}", limits)
    else:
        assert isinstance(source, bytes | Path)
        with opened(source, where, limits) as image:
            count = _frame_count(image, where, source_name(source), limits)
            # Some formats tell the delay of a frame once it is decoded.
            width, height = upright(image).size
            rate = frames_per_second or 1000 / (image.info.get("duration") or _DEFAULT_DELAY)
        frames = sample_frames(count, rate, sampling)
    if len(frames) * width * height > limits.most_video_pixels:
        problem = f"takes {len(frames)} frames of {width}x{height}, more than {limits.most_video_pixels} pixels"
        raise DataError(where, _name(source), problem, "scale it down, or take fewer frames")
    return VideoInfo(width, height, frames), files


def _frame_files(source: VideoSource, where: str, limits: ImageLimits) -> Sequence[bytes | Path] | None:
    """The frames of a folder, in the order of the numbers in their names, or of a list; None for an animation."""
    if isinstance(source, bytes) or (isinstance(source, Path) and not source.is_dir()):
        _refuse_containers(source, where, limits)
        return None
    if isinstance(source, Path):
        shown = [path for path in source.iterdir() if not path.name.startswith(".")]
        shown.sort(key=_natural)
        files: Sequence[bytes | Path] = shown
    else:
        files = source
    if not 1 <= len(files) <= limits.most_frames:
        problem = f"has {len(files)} frames, not between 1 and {limits.most_frames}"
        raise DataError(where, _name(source), problem, "extract its frames at a lower rate")
    return files


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that puts frame 10 behind frame 9."""
    # Text with number -1, numbers with text "": the two never meet at one place of the split.
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), part) if index % 2 else (-1, part) for index, part in enumerate(parts)]


def _frame_count(image: Image.Image, where: str, name: str, limits: ImageLimits) -> int:
    count: int = getattr(image, "n_frames", 1)
    if count > limits.most_frames:
        raise DataError(where, name, f"has {count} frames, more than {limits.most_frames}", "cut it into clips")
    return count


def _refuse_containers(source: bytes | Path, where: str, limits: ImageLimits) -> None:
    with stream_of(source, where, limits.replace(most_bytes=2**62)) as stream:
        head = stream.read(12)
    is_mp4 = head[4:8] == b"ftyp" and head[8:11] not in _STILL_BRANDS
    if is_mp4 or head.startswith(_CONTAINERS) or (head[:4], head[8:]) == (b"RIFF", b"AVI "):
        raise UnavailableError(
            where,
            source_name(source),
            "is a film, and no decoder for films is installed",
            "extract its frames, for example with ffmpeg -i FILM -vf fps=1 FOLDER/%05d.jpg, and give the folder",
        )


def _name(source: VideoSource) -> str:
    return source_name(source) if isinstance(source, bytes | Path) else f"{len(source)} frames"
