"""What the samples of published data sets are taken to be like, where no prepared data say it.

Sizes of pictures and lengths of texts are ours, from data sets of these kinds; where a mean is published it stands with
its source. A plan prints which of these it used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megavlm.data.catalog import CATALOG
from megavlm.data.order import SourceConfig, StreamConfig

Size = tuple[int, int]
PHOTOS: tuple[Size, ...] = ((640, 480), (640, 480), (480, 640), (640, 427), (500, 375), (1024, 768), (1024, 1024))
PAGES: tuple[Size, ...] = ((1240, 1754), (1654, 2339), (1700, 2200), (850, 1100))
SCREENS: tuple[Size, ...] = ((1920, 1080), (1280, 720), (1080, 1920), (640, 480), (850, 600), (1200, 800))
FIGURES: tuple[Size, ...] = ((240, 200), (400, 300), (384, 384), (600, 200))
LONGEST_TEXT = 4_000


@dataclass(frozen=True)
class SampleKind:
    """A kind of sample."""

    about: str
    """As the output names it."""
    text: int
    """Median of its text tokens, tags included."""
    spread: float
    """Standard deviation of the logarithm of its text tokens."""
    sizes: tuple[Size, ...] = PHOTOS
    """(width, height) of its pictures, equally often."""
    pictures: tuple[float, ...] = (0.0, 1.0)
    """How often it has 0, 1, 2 ... pictures."""


PAIR = SampleKind("captions of the web", 24, 0.5)
# OBELICS has 353M images in 141M documents, of 816 tokens in the mean (arXiv 2306.16527, table 1).
DOCUMENT = SampleKind("interleaved documents", 600, 0.8, pictures=(0.0, 0.4, 0.25, 0.15, 0.1, 0.05, 0.05))
QUESTION = SampleKind("questions with short answers", 24, 0.6)
CAPTION = SampleKind("long captions", 110, 0.5)
CONVERSATION = SampleKind("conversations about a picture", 300, 0.7, pictures=(0.06, 0.94))
GENERAL = SampleKind("visual instructions", 200, 0.8, pictures=(0.0, 0.93, 0.03, 0.04))
SCREEN = SampleKind("documents, charts and screens", 150, 0.8, sizes=(*PAGES, *SCREENS))
PAGE = SampleKind("scanned pages", 120, 0.7, sizes=PAGES)
OCR = SampleKind("text in pictures", 90, 0.7, sizes=(*PHOTOS, *SCREENS))
MATHS = SampleKind("figures with questions", 250, 0.7, sizes=FIGURES)
TEXT = SampleKind("instructions without pictures", 350, 1.0, pictures=(1.0,))

_BY_TYPE = {
    "pairs": PAIR,
    "interleaved documents": DOCUMENT,
    "caption": QUESTION,
    "general VQA": QUESTION,
    "text-oriented VQA": QUESTION,
    "conversations": CONVERSATION,
    "image-caption": CAPTION,
}
_BY_FOLDER = {
    "infinity-mm-general-ocr": OCR,
    "infinity-mm-doc-chart-screen": SCREEN,
    "infinity-mm-math-reasoning": MATHS,
    "infinity-mm-text-instruct": TEXT,
    "infinity-instruct-subjective-part": TEXT,
    "infinity-mm-docmatix": PAGE,
    "infinity-preference": TEXT,
    "toy-pairs": SampleKind("toy captions", 24, 0.3, sizes=((64, 64),)),
    "toy-documents": SampleKind("toy documents", 120, 0.3, sizes=((64, 64),), pictures=(0.0, 0.0, 0.5, 0.5)),
    "toy-chat": SampleKind("toy conversations", 150, 0.3, sizes=((64, 64),)),
    "toy-multi_image": SampleKind("toy conversations", 150, 0.3, sizes=((64, 64),), pictures=(0.0, 0.0, 0.5, 0.5)),
    "toy-text": SampleKind("toy text", 60, 0.3, pictures=(1.0,)),
}
_SIZES = {entry.slug: entry.samples for entry in CATALOG}
_TYPES = {entry.slug: entry.type for entry in CATALOG}


@dataclass(frozen=True)
class AssumedSample:
    """A sample that was drawn."""

    text: int
    pictures: tuple[Size, ...]


def kind_of(source: SourceConfig) -> SampleKind:
    """What the samples of a data set are taken to be like; visual instructions where nothing is known of it."""
    return _BY_FOLDER.get(source.name) or _BY_TYPE.get(_TYPES.get(source.name, ""), GENERAL)


def draw_stream(stream: StreamConfig, draw: np.random.Generator, has_eyes: bool) -> list[AssumedSample]:
    """The samples that a stream gives to a step."""
    kinds = [kind_of(source) for source in stream.sources]
    chosen = draw.choice(len(kinds), stream.samples_per_step, p=_shares(stream.sources))
    found: list[AssumedSample] = [AssumedSample(0, ())] * len(chosen)
    for number in np.unique(chosen).tolist():
        places = np.flatnonzero(chosen == number).tolist()
        for place, sample in zip(places, _draw(kinds[number], len(places), draw, has_eyes), strict=True):
            found[place] = sample
    return found


def _shares(sources: Sequence[SourceConfig]) -> NDArray[np.float64]:
    weights = [
        source.weight or source.samples or (source.epochs or 1) * (_SIZES.get(source.name) or 1) for source in sources
    ]
    return np.array(weights, dtype=float) / sum(weights)


def _draw(kind: SampleKind, samples: int, draw: np.random.Generator, has_eyes: bool) -> Iterator[AssumedSample]:
    text = np.clip(kind.text * np.exp(kind.spread * draw.standard_normal(samples)), 8, LONGEST_TEXT).astype(np.int64)
    counts = draw.choice(len(kind.pictures), samples, p=kind.pictures) if has_eyes else np.zeros(samples, np.int64)
    sizes = iter(draw.integers(len(kind.sizes), size=int(counts.sum())).tolist())
    for tokens, count in zip(np.maximum(text, counts + 2).tolist(), counts.tolist(), strict=True):
        yield AssumedSample(tokens, tuple(kind.sizes[next(sizes)] for _ in range(count)))
