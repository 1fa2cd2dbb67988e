"""Some packed rows as the loader makes them, taken apart for people to look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megavlm.batch import TextBatch
from megavlm.config import require
from megavlm.data.formats import AttendedFormat, PlannedPicture, SampleFormat, SplicedFormat
from megavlm.data.index import Index
from megavlm.data.loader import Loader, SampleName, StepBatches
from megavlm.data.look import LookConfig
from megavlm.data.order import OverLong, SourceConfig, StreamConfig
from megavlm.data.packing import PackLimits
from megavlm.data.step_plan import DataConfig, Planner, Source, open_sources
from megavlm.errors import ConfigError, DataError
from megavlm.tiles import Ints

MOST_SAMPLES = 512
"""Samples of a row that are tried at most."""


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(LookConfig):
    """Which rows are shown."""

    html: str | None = None
    """File for the page."""
    rows: int = 8
    """Rows that are shown; fewer where all samples fit into them."""
    max_tokens: int = 4096
    """Tokens of a row at most."""
    max_tiles: int | None = None
    """Tiles of a row at most; none: any number."""
    tokens_per_sample: int | None = None
    """The longest that a sample may be; none: as long as a row."""
    over_long: OverLong = "cut"
    """What becomes of longer ones: an error, their last text left out, the whole sample left out."""
    seed: int = 1234
    """Of the order of the samples."""
    threads: int = 4
    """Threads that read and decode."""

    def check(self) -> None:
        super().check()
        require(1 <= self.rows <= 256, self, "rows", "is not between 1 and 256", "use for example 8")
        require(self.seed >= 0, self, "seed", "is negative", "use 0 or more")
        require(self.threads >= 1, self, "threads", "is below 1", "use 1 or more")
        assert self.limits.max_tokens == self.max_tokens

    @property
    def limits(self) -> PackLimits:
        """How large rows may be: as many as the samples need."""
        return PackLimits(max_tokens=self.max_tokens, max_tiles=self.max_tiles, rows_multiple=1)


@dataclass(frozen=True)
class ShownPicture:
    """A picture of a document."""

    planned: PlannedPicture
    files: list[bytes]
    """Those that are taken of it; empty where they cannot be read."""
    tokens: int
    """Those that stand for it in the row."""
    is_attended: bool = False
    """Whether its middle square is attended to, as InfiMM does."""


@dataclass(frozen=True)
class ShownDocument:
    """A sample of a row."""

    name: SampleName
    id: str | None
    """Its own; None where its words cannot be read."""
    tokens: Ints
    is_trained: NDArray[np.bool_]
    is_picture: NDArray[np.bool_]
    """Where tokens stand for pictures."""
    pictures: list[ShownPicture]
    is_cut: bool
    """Whether the last of its text was left out."""
    problems: list[str]

    @property
    def tiles(self) -> int:
        return sum(picture.planned.tiles for picture in self.pictures)


@dataclass(frozen=True)
class ShownRow:
    """A row: its documents, and padding."""

    documents: list[ShownDocument]
    length: int
    """With padding."""

    @property
    def tokens(self) -> int:
        return sum(len(document.tokens) for document in self.documents)

    @property
    def trained(self) -> int:
        return sum(int(document.is_trained.sum()) for document in self.documents)


@dataclass(frozen=True)
class Preview:
    """What is shown."""

    folders: list[str]
    config: PreviewConfig
    words: SampleFormat
    rows: list[ShownRow]
    dropped: int
    """Samples that were left out for their length."""


def make_preview(folders: Sequence[str], config: PreviewConfig) -> Preview:
    """The first rows of a run over these data sets, each sample seen once."""
    words = config.format
    root, names = _names(folders)
    sizes = {name: len(Index.open(root / name)) for name in names}
    for name, size in sizes.items():
        if size == 0:
            raise DataError("dataset", str(root / name), "holds no sample", "leave it out")
    sources = open_sources(_data_config(config, root, names, 1), words)
    samples = _samples_in_rows(config, root, names, sources, words)
    loader = Loader(
        _data_config(config, root, names, samples),
        words,
        sources,
        config.decoder(config.threads),
        lambda tiles: [tuple(range(len(of_row))) for of_row in tiles],
        seed=config.seed,
        data_rank=0,
        data_size=1,
        empty=torch.empty(0, 3 * config.patch_size**2),
    )
    step = loader.step(0)
    by_name = {source.name: source for source in sources}
    rows = [_row(number, step, by_name, words) for number in range(len(step.batches))]
    return Preview(list(folders), config, words, rows, int(step.plan.is_dropped.sum()))


def _names(folders: Sequence[str]) -> tuple[Path, list[str]]:
    """(root, names): as a run names data sets that lie in one folder, which decides their order."""
    paths = [os.path.abspath(folder) for folder in folders]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise ConfigError("DIR", folders[place], "is given twice", "leave one out")
    parents = {os.path.dirname(path) for path in paths}
    if len(parents) == 1:
        return Path(parents.pop()), [os.path.basename(path) for path in paths]
    return Path("/"), [path.lstrip("/") for path in paths]


def _data_config(config: PreviewConfig, root: Path, names: Sequence[str], samples: int) -> DataConfig:
    stream = StreamConfig(
        samples_per_step=samples,
        tokens_per_sample=config.tokens_per_sample,
        over_long=config.over_long,
        sources=tuple(SourceConfig(name=name, epochs=1.0) for name in names),
    )
    return DataConfig(
        path=str(root), streams=(stream,), chat=config.chat, rows=config.limits, threads=config.threads, ahead=0
    )


def _samples_in_rows(
    config: PreviewConfig, root: Path, names: Sequence[str], sources: Sequence[Source], words: SampleFormat
) -> int:
    """As many samples as fit into the rows that are shown."""
    most = min(sum(len(source.index) for source in sources), MOST_SAMPLES * config.rows)

    def fits(samples: int) -> bool:
        planner = Planner(_data_config(config, root, names, samples), sources, words, config.seed)
        return planner.plan(0).packing.rows <= config.rows

    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _row(number: int, step: StepBatches, sources: dict[str, Source], words: SampleFormat) -> ShownRow:
    """What a row of the step holds, by its batch."""
    batch, names = step.batches[number], step.samples[number]
    problems: dict[int, list[str]] = {}
    for damage in step.damaged:
        if damage.row == number:
            problems.setdefault(damage.document, []).append(damage.problem)
    assert batch.cu_seqlens is not None
    bounds = batch.cu_seqlens.tolist()
    documents = [
        _document(step, name, batch, slice(first, last), sources[name.source], words, problems.get(place, []))
        for place, (name, first, last) in enumerate(zip(names, bounds, bounds[1:], strict=False))
    ]
    return ShownRow(documents, batch.tokens.size(1))


def _document(
    step: StepBatches,
    name: SampleName,
    batch: TextBatch,
    span: slice,
    source: Source,
    words: SampleFormat,
    problems: list[str],
) -> ShownDocument:
    tokens = batch.tokens[0, span].numpy()
    weights = batch.loss_weights[0, span].numpy()
    # A position's weight is that of the token behind it.
    is_trained = np.concatenate([[False], weights[:-1] > 0])
    pictures, number = step.plan.pictures_of(name.place)
    found = []
    for planned in words.plan(pictures, number):
        try:
            files = source.reader.read_pictures(name.index, planned.files)
        except DataError:
            files = []
        is_attended = isinstance(words, AttendedFormat)
        found.append(ShownPicture(planned, files, 1 if is_attended else planned.plan.tokens, is_attended))
    try:
        own_id = source.reader.read_text(name.index).id
    except DataError:
        own_id = None
    is_picture = np.isin(tokens, _picture_tokens(words))
    is_cut = bool(step.plan.is_cut[name.place])
    return ShownDocument(name, own_id, tokens, is_trained, is_picture, found, is_cut, problems)


def _picture_tokens(words: SampleFormat) -> list[int]:
    if isinstance(words, SplicedFormat):
        return list(words.placeholders)
    assert isinstance(words, AttendedFormat)
    return [words.image_token_id]
