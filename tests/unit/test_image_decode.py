"""Pictures that are damaged, hostile or no pictures: an error each, no noise, no memory."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded, huge_png, noise, png_chunk, png_of, turned_exif

from megavlm.config import Config
from megavlm.data.images import ImageLimits, decode_image, image_size, open_image
from megavlm.errors import ConfigError, DataError

KINDS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")
OPEN_FILES = Path("/proc/self/fd")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (huge_png(), "has more than 80000000 pixels; scale it down"),
        (png_of(1, 65_535, bytes(2 * 65_535)), "is 1x65535, longer than 16384 pixels"),
        (png_of(16_384, 16, bytes(16 * 16_385)), "one side more than 1000 times the other"),
        (b"", "0 bytes.*is no picture that can be read"),
        (b"hello", "5 bytes.*is no picture that can be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture that can be read"),
        (encoded(noise(30, 20), "TGA"), "is no picture that can be read"),
        (encoded(noise(30, 20), "PNG")[:20], "cannot be read|is no picture"),
        (encoded(noise(30, 20), "PNG")[:900], "cannot be read: image file is truncated"),
        (encoded(noise(30, 20), "JPEG")[:-300], "cannot be read: image file is truncated"),
        (png_of(2, 2, bytes(6), depth=7), "is no picture that can be read"),
    ],
    ids=["huge", "long", "thin", "empty", "text", "eps", "tga", "header", "cut", "cut jpeg", "depth"],
)
def test_what_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^sample 7, image 2 = .*({problem})"):
        decode_image(content, "sample 7, image 2")
    with pytest.raises(DataError, match=r"^image = '.*bad.bin'"):
        open_image(path)


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        (ImageLimits(most_bytes=100), "more than 100 bytes; compress it"),
        (ImageLimits(most_pixels=599), "more than 599 pixels"),
        (ImageLimits(longest_side=29), "is 30x20, longer than 29"),
        (ImageLimits(largest_aspect=1), "is 30x20, one side more than 1 times the other"),
    ],
)
def test_limits(limits: ImageLimits, problem: str) -> None:
    content = encoded(noise(30, 20), "PNG")
    for read in (decode_image, image_size):
        with pytest.raises(DataError, match=problem):
            read(content, "picture", limits)
    just = ImageLimits(most_bytes=len(content), most_pixels=600, longest_side=30, largest_aspect=2)
    assert decode_image(content, "picture", just).shape == (20, 30, 3)
    with pytest.raises(ConfigError, match=r"most_frames.*is below 1"):
        ImageLimits(most_frames=0)
    assert isinstance(limits, Config)


def test_the_size_needs_the_header_alone() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"):
        content = encoded(noise(300, 200), kind)
        assert image_size(content) == (300, 200)
    assert image_size(encoded(noise(300, 200), "JPEG", exif=turned_exif(6))[:2000]) == (200, 300)
    assert image_size(encoded(noise(300, 200), "PNG")[:500]) == (300, 200)


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM" + b"\xff" * 60])
def test_a_broken_exif_leaves_the_picture_as_it_is_stored(exif: bytes) -> None:
    content = encoded(noise(30, 20), "JPEG", exif=exif)
    assert image_size(content) == (30, 20)
    assert np.array_equal(decode_image(content, "picture"), decode_image(encoded(noise(30, 20), "JPEG"), "picture"))


@pytest.mark.parametrize("kind", KINDS)
def test_any_damage_ends_in_pixels_or_an_error(kind: str) -> None:
    """Cut anywhere, or with bytes overwritten."""
    draw = random.Random(kind)
    content = encoded(noise(31, 19), kind)
    outcomes = []
    for number in range(60):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 6)):
            # The beginning, where the structure is, gets half of it.
            damaged[draw.randrange(len(content) if number % 2 else min(80, len(content)))] = draw.randrange(256)
        cut = damaged[: draw.randrange(len(content))] if number % 3 == 0 else damaged
        try:
            pixels = decode_image(bytes(cut), "picture")
            assert pixels.dtype == np.uint8 and image_size(bytes(cut)) == (pixels.shape[1], pixels.shape[0])
            outcomes.append(True)
        except DataError:
            outcomes.append(False)
    assert not all(outcomes)


def test_what_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        with pytest.raises(DataError, match="cannot be read: it is no file"):
            decode_image(path, "picture")
    with pytest.raises(DataError, match="there is no such file"):
        image_size(tmp_path / "none")


@pytest.mark.skipif(not OPEN_FILES.exists(), reason="needs /proc")
def test_no_file_stays_open(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("good", "cut", "text", "animated", "huge")]
    good = encoded(noise(40, 30), "PNG")
    frames = [noise(40, 30, seed=seed) for seed in range(3)]
    animated = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for path, content in zip(paths, (good, good[:300], b"text", animated, huge_png()), strict=True):
        path.write_bytes(content)
    before = len(os.listdir(OPEN_FILES))
    kept = []
    for path in paths:
        for read in (lambda path: decode_image(path, "picture"), image_size, open_image):
            try:
                kept.append(read(path))
            except DataError as error:
                kept.append(error)
    assert len(os.listdir(OPEN_FILES)) == before


_HOSTILE = """
import sys
from pathlib import Path
from megavlm.data.images import decode_image, image_size, open_image
from megavlm.errors import DataError

def most_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = most_memory()
for path in map(Path, sys.argv[1:]):
    for read in (image_size, open_image, lambda path: decode_image(path, "picture")):
        try:
            read(path)
        except DataError:
            pass
print((most_memory() - before) // 1024)
"""


@pytest.mark.skipif(not OPEN_FILES.exists(), reason="needs /proc")
def test_hostile_files_take_no_memory_and_print_nothing(tmp_path: Path) -> None:
    """Huge pictures in small files; and those of which PIL has something to say."""
    contents = [
        huge_png(),
        huge_png(10_000),
        png_of(1, 65_535, bytes(2 * 65_535)),
        png_of(40_000, 1, bytes(40_001)),
        png_of(9, 9, bytes(90), before=png_chunk(b"zTXt", b"a\0\0" + b"x" * 50)),
        encoded(noise(30, 20).quantize(50), "PNG", transparency=bytes(50)),
        encoded(noise(30, 20), "TIFF")[:-40],
        encoded(noise(30, 20), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xee" * 40),
    ]
    paths = [tmp_path / f"{number}.bin" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", _HOSTILE, *map(str, paths)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) < 48, "MiB"
