"""What a data set holds, found in its index in blocks: counts, and how sizes, tokens and tiles are spread.

The index tells all but what only the words say (sources, kinds of samples): that is asked of some samples, evenly
spread over the data set.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megavlm.config import require
from megavlm.data.formats import spliced_costs
from megavlm.data.headers import FORMATS
from megavlm.data.index import Index, IndexReport, Pictures, TokenCounts
from megavlm.data.look import NO_GRID, LookConfig, parse_grid
from megavlm.data.progress import Progress
from megavlm.data.read import ShardReader
from megavlm.data.tally import QUANTILES, Shares, Tally
from megavlm.data.video import DEFAULT_SAMPLING
from megavlm.errors import ConfigError, DataError
from megavlm.tiles import GridConfig, Ints

BLOCK = 100_000
"""Samples that are looked at together."""
READ_THREADS = 8
_SIDES = ((1, 4), (1, 3), (1, 2), (2, 3), (3, 4), (19, 20), (20, 19), (4, 3), (3, 2), (2, 1), (3, 1), (4, 1))
ASPECTS = tuple(width / height for width, height in _SIDES)
ASPECT_NAMES = ("below 1:4", *(f"from {width}:{height}" for width, height in _SIDES))


@dataclass(frozen=True, kw_only=True)
class InspectConfig(LookConfig):
    """What is told of a data set."""

    png: str | None = None
    """File for the plots as a picture."""
    json: bool = False
    """Everything as JSON instead of words and plots."""
    read: int = 1000
    """Samples of which the words are read, for what the index does not hold: their sources and kinds."""

    def check(self) -> None:
        super().check()
        require(self.read >= 0, self, "read", "is negative", "use 0 for none")


@dataclass
class Counts:
    """How the token counts of that name are spread."""

    name: str
    text: Tally = field(default_factory=Tally)
    targets: Tally = field(default_factory=Tally)
    unreadable: int = 0


@dataclass
class Cut:
    """What the pictures cost under a grid."""

    grid: GridConfig
    tokens: Tally = field(default_factory=Tally)
    """Of each sample's pictures, the tags included."""
    tiles: Tally = field(default_factory=Tally)
    total: Tally = field(default_factory=Tally)
    """Of each sample with its text; empty where that is not counted."""


@dataclass
class SomeWords:
    """What some samples' words say."""

    read: int = 0
    failed: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)


@dataclass
class Inspection:
    """What was found."""

    folder: str
    report: IndexReport
    shards: int
    token_sets: list[str]
    """The names of all token counts that there are."""
    images: int = 0
    videos: int = 0
    frames: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    width: Tally = field(default_factory=Tally)
    height: Tally = field(default_factory=Tally)
    aspect: Shares = field(default_factory=lambda: Shares(ASPECTS, ASPECT_NAMES))
    pictures: Tally = field(default_factory=Tally)
    """Of each sample."""
    counts: Counts | None = None
    cut: Cut | None = None
    words: SomeWords = field(default_factory=SomeWords)

    @property
    def tallies(self) -> list[tuple[str, Tally]]:
        """What is plotted, under its headings; what nothing is known of is left out."""
        found = [("width in pixels", self.width), ("height in pixels", self.height)]
        found.append(("pictures of a sample", self.pictures))
        if self.counts is not None:
            found += [
                ("text tokens of a sample", self.counts.text),
                ("trained tokens of a sample", self.counts.targets),
            ]
        if self.cut is not None:
            found += [("image tokens of a sample", self.cut.tokens), ("tiles of a sample", self.cut.tiles)]
            found.append(("tokens of a sample in all", self.cut.total))
        return [(name, tally) for name, tally in found if tally.count]


def inspect_folder(folder: str, config: InspectConfig) -> Inspection:
    """Look through a data set's index."""
    index = Index.open(folder)
    found = Inspection(folder, index.report, len(index.shard_names), list(index.token_sets()))
    named = _named_counts(index, config)
    if named is not None:
        found.counts = Counts(named[0])
    if config.grid is not None:
        found.cut = Cut(_grid(config))
    progress = Progress("inspecting", len(index), "samples")
    for first, last in _blocks(len(index)):
        pictures = index.pictures(np.arange(first, last))
        _add_pictures(found, pictures)
        _add_tokens(found, pictures, named[1] if named else None, slice(first, last))
        progress.update(last)
    progress.clear()
    found.words = _some_words(index, folder, config.read)
    return found


def _grid(config: InspectConfig) -> GridConfig:
    grid = parse_grid(config.grid or "", config.tile_size, config.patch_size)
    if grid is None:
        problem = "has a token and a tile for each picture, which needs no counting"
        raise ConfigError("--grid", NO_GRID, problem, "leave it out")
    return grid


def _named_counts(index: Index, config: InspectConfig) -> tuple[str, TokenCounts] | None:
    """The counts of the tokenizer that is named, or else the only ones that there are."""
    if config.tokenizer is not None:
        words = config.words
        return words.name, index.token_counts(words.name, words.hash, words.options)
    sets = index.token_sets()
    if len(sets) != 1:
        return None
    ((name, about),) = sets.items()
    return name, index.token_counts(name, about["hash"])


def _blocks(samples: int) -> Iterator[tuple[int, int]]:
    for first in range(0, samples, BLOCK):
        yield first, min(first + BLOCK, samples)


def _add_pictures(found: Inspection, pictures: Pictures) -> None:
    first = pictures.is_first
    width, height, is_video = pictures.width[first], pictures.height[first], pictures.is_video[first]
    found.images += int((~is_video).sum())
    found.videos += int(is_video.sum())
    found.frames += int(pictures.is_video.sum())
    for code, count in enumerate(np.bincount(pictures.format, minlength=0).tolist()):
        if count:
            found.formats[FORMATS[code] if code < len(FORMATS) else f"unknown ({code})"] += count
    found.width.add(width)
    found.height.add(height)
    found.aspect.add(width / np.maximum(height, 1))
    found.pictures.add(_pictures_of_samples(pictures))


def _add_tokens(found: Inspection, pictures: Pictures, counts: TokenCounts | None, block: slice) -> None:
    text = None
    if found.counts is not None and counts is not None:
        text = counts.tokens[block].astype(np.int64)
        found.counts.unreadable += int((text == 0).sum())
        found.counts.text.add(text)
        found.counts.targets.add(counts.targets[block])
    if found.cut is not None:
        cost = spliced_costs(pictures, found.cut.grid, DEFAULT_SAMPLING)
        found.cut.tokens.add(cost.tokens + _pictures_of_samples(pictures))  # the costs leave out the tags
        found.cut.tiles.add(cost.tiles)
        if text is not None:
            found.cut.total.add((text + cost.tokens)[text > 0])


def _pictures_of_samples(pictures: Pictures) -> Ints:
    begun = np.concatenate([[0], np.cumsum(pictures.is_first)])
    return np.diff(begun[pictures.offsets])


def _some_words(index: Index, folder: str, most: int) -> SomeWords:
    """The sources and kinds of samples that are evenly spread over all."""
    found = SomeWords()
    some = np.unique(np.linspace(0, len(index) - 1, min(most, len(index))).astype(np.int64))
    reader = ShardReader(folder, index)

    def read(sample: int) -> tuple[str, str] | None:
        try:
            read = reader.read_text(int(sample))
        except DataError:
            return None
        kind = f"{len(read.turns)} turns" if read.turns else "document"
        return read.source, kind

    with ThreadPoolExecutor(READ_THREADS) as pool:
        for said in pool.map(read, some):
            if said is None:
                found.failed += 1
                continue
            found.read += 1
            found.sources[said[0]] += 1
            found.kinds[said[1]] += 1
    return found


def as_json(found: Inspection) -> dict[str, Any]:
    """All of it, as JSON can hold it."""
    report, counts, cut = found.report, found.counts, found.cut
    record: dict[str, Any] = {
        "folder": found.folder,
        "samples": report.samples,
        "images": found.images,
        "videos": found.videos,
        "video_frames": found.frames,
        "bytes": report.bytes,
        "shards": found.shards,
        "formats": dict(found.formats.most_common()),
        "refused": report.refused,
        "damaged_shards": report.damaged,
        "samples_read": found.words.read,
        "sources_of_samples_read": dict(found.words.sources.most_common()),
        "kinds_of_samples_read": dict(found.words.kinds.most_common()),
        "aspect_ratios": dict(zip(ASPECT_NAMES, found.aspect.counts.tolist(), strict=True)),
    }
    if counts is not None:
        record["token_counts"] = {
            "name": counts.name,
            "text_tokens": counts.text.sum,
            "trained_tokens": counts.targets.sum,
            "uncounted_samples": counts.unreadable,
        }
    if cut is not None:
        record["grid"] = {**cut.grid.to_dict(), "image_tokens": cut.tokens.sum, "tiles": cut.tiles.sum}
    record["distributions"] = {name: _distribution(tally) for name, tally in found.tallies}
    return record


def _distribution(tally: Tally) -> dict[str, Any]:
    return {
        "count": tally.count,
        "sum": tally.sum,
        "mean": tally.mean,
        "least": tally.least,
        "most": tally.most,
        "quantiles": {str(share): tally.quantile(share) for share in QUANTILES},
        "bars": [{"first": bar.first, "last": bar.last, "count": bar.values} for bar in tally.bars()],
    }
