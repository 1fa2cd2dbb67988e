"""Random samples with real picture files, and chunks of them that worker processes can take."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megavlm.data.sample import Picture, Refusal, Sample, Turn

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def picture_file(rng: np.random.Generator, kind: str | None = None, size: tuple[int, int] | None = None) -> bytes:
    """The file of a noisy picture."""
    width, height = size if size is not None else (int(side) for side in rng.integers(1, 40, 2))
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind or str(rng.choice(FORMATS)))
    return buffer.getvalue()


def random_sample(rng: np.random.Generator, name: str) -> Sample:
    """A conversation or a document with zero to three pictures, each tenth a video."""
    pictures = []
    for _ in range(rng.integers(0, 4)):
        frames = int(rng.integers(1, 5)) if rng.random() < 0.1 else 0
        pictures.append(Picture(tuple(picture_file(rng) for _ in range(max(1, frames))), is_video=frames > 0))
    tags = "".join("<video>" if picture.is_video else "<image>" for picture in pictures)
    words = "".join(chr(letter) for letter in rng.integers(0x20, 0x9FFF, rng.integers(1, 60)))
    source = str(rng.choice(["", "toy"]))
    if rng.random() < 0.3:
        return Sample(name, tuple(pictures), text=tags + words, source=source)
    turns = (Turn("system", "Be brief."), Turn("user", f"{tags}{words}?"), Turn("assistant", words[::-1]))
    return Sample(name, tuple(pictures), turns=turns[rng.integers(0, 2) :], source=source)


@dataclass(frozen=True)
class RandomChunk:
    """So many random samples, the same whenever they are read; and a refusal where there is one."""

    seed: int
    count: int
    refusal: str = ""

    def __iter__(self) -> Iterator[Sample | Refusal]:
        if self.refusal:
            yield Refusal(f"lost-{self.seed}", self.refusal)
        rng = np.random.default_rng(self.seed)
        for number in range(self.count):
            yield random_sample(rng, f"a/{self.seed}.{number}")


@dataclass(frozen=True)
class DeadlyChunk:
    """A chunk that kills its process half-way, the first time it is read."""

    chunk: RandomChunk
    flag: Path

    def __iter__(self) -> Iterator[Sample | Refusal]:
        for number, sample in enumerate(self.chunk):
            if number == self.chunk.count // 2 and not self.flag.exists():
                self.flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield sample


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """The contents of all files of a folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
