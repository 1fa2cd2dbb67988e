"""What is prepared: the files of all sources, how many records each has, which are taken, and how they make chunks."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megavlm.data.mixture import chosen
from megavlm.data.readers.base import Context, Entry, ReadOptions, printable, samples_of
from megavlm.data.readers.registry import READERS, detect, files_of
from megavlm.data.sample import Refusal, Sample
from megavlm.errors import DataError

Numbers = range | NDArray[np.int64]
_WATCH = "megavlm-parent"
PLAIN_FOLDERS = ("data", "train", "default")
"""Names of folders that say nothing about the data set in them."""


class Source(NamedTuple):
    """A file or folder that is to be prepared."""

    path: str
    format: str | None = None
    images: str | None = None
    strategy: str = "all"


class InputFile(NamedTuple):
    """One file of a source."""

    path: str
    label: str
    """Unique among the files of a plan; ids of samples name it."""
    source: int
    format: str
    dataset: str
    images: str | None
    size: int
    modified: int


class Counted(NamedTuple):
    """The records of a file, or why they can't be read."""

    records: int
    problem: str = ""


@dataclass(frozen=True)
class Piece:
    """Records of one file."""

    file: InputFile
    numbers: Numbers


@dataclass(frozen=True)
class RecordChunk:
    """A fixed number of the records that are taken, counted over all files in their order; the last has fewer."""

    pieces: tuple[Piece, ...]
    problems: tuple[Refusal, ...]
    """Files that can't be read; of the first chunk only."""
    options: ReadOptions

    def __len__(self) -> int:
        return sum(len(piece.numbers) for piece in self.pieces)

    def __iter__(self) -> Iterator[Sample | Refusal]:
        leave_with_parent()
        yield from self.problems
        for piece in self.pieces:
            yield from read_records(piece, self.options)


def input_files(sources: Sequence[Source]) -> list[InputFile]:
    """The files of all sources, each under a label of its own."""
    found: list[InputFile] = []
    used: set[str] = set()
    for number, source in enumerate(sources):
        root = Path(source.path)
        paths = files_of(root, source.format)
        name = source.format or detect(root)
        for path in paths:
            relative = path.relative_to(root) if path != root else PurePath(path.name)
            label = _unused(printable(relative.as_posix()), used)
            used.add(label)
            status = path.stat()
            dataset = _dataset_name(root, relative)
            found.append(
                InputFile(str(path), label, number, name, dataset, source.images, status.st_size, status.st_mtime_ns)
            )
    return found


def _unused(label: str, used: set[str]) -> str:
    names = itertools.chain([label], (f"{label}~{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in used)


def _dataset_name(root: Path, relative: PurePath) -> str:
    """The data set that a file belongs to: its folder within the source, or the source itself."""
    parts = [part for part in relative.parts[:-1] if part.lower() not in PLAIN_FOLDERS]
    if parts:
        return printable("/".join(parts))
    return printable(Path(os.path.abspath(root)).name.partition(".")[0]) or "data"


def count_records(file: InputFile, options: ReadOptions) -> Counted:
    """How many records a file has, or why it can't be read."""
    try:
        return Counted(READERS[file.format].container.count(Path(file.path), options))
    except DataError as error:
        return Counted(0, str(error))


def make_chunks(
    sources: Sequence[Source],
    files: Sequence[InputFile],
    counts: Sequence[Counted],
    options: ReadOptions,
    chunk_records: int,
    seed: int,
) -> list[RecordChunk]:
    """All that is to be read, in its order; an error, where none of the files can be."""
    broken = [(file, counted.problem) for file, counted in zip(files, counts, strict=True) if counted.problem]
    if len(broken) == len(files):
        raise DataError("source", broken[0][0].path, "cannot be used", broken[0][1])
    pieces: list[Piece] = []
    for number, source in enumerate(sources):
        own = [(file, counted.records) for file, counted in zip(files, counts, strict=True) if file.source == number]
        total = sum(records for _, records in own)
        numbers = chosen(source.strategy, total, f"{number} {PurePath(source.path).name}", seed)
        taken = _by_file(numbers, [records for _, records in own])
        pieces += [Piece(file, part) for (file, _), part in zip(own, taken, strict=True) if len(part)]
    problems = tuple(Refusal(file.label, f"file unusable: {problem}") for file, problem in broken)
    chunks = [RecordChunk(tuple(part), (), options) for part in _cut(pieces, chunk_records)]
    first = chunks[0].pieces if chunks else ()
    return [RecordChunk(first, problems, options), *chunks[1:]]


def _cut(pieces: Sequence[Piece], size: int) -> Iterator[list[Piece]]:
    """Pieces cut and put together to so many records each."""
    found: list[Piece] = []
    room = size
    for piece in pieces:
        start = 0
        while start < len(piece.numbers):
            part = piece.numbers[start : start + room]
            found.append(Piece(piece.file, part))
            start, room = start + len(part), room - len(part)
            if room == 0:
                yield found
                found, room = [], size
    if found:
        yield found


def _by_file(numbers: Numbers, counts: Sequence[int]) -> Iterator[Numbers]:
    """Numbers over several files as numbers within each."""
    first = 0
    for count in counts:
        if isinstance(numbers, range):
            start, stop = max(numbers.start - first, 0), min(numbers.stop - first, count)
            yield range(start, max(start, stop))
        else:
            low, high = np.searchsorted(numbers, [first, first + count])
            yield numbers[low:high] - first
        first += count


class _Open:
    """The file that this process read last: the next chunk most often goes on where the last one ended."""

    file: InputFile | None = None
    options: ReadOptions | None = None
    entries: Iterator[Entry] = iter(())
    following = 0


def read_records(piece: Piece, options: ReadOptions) -> Iterator[Sample | Refusal]:
    """The samples and refusals of a piece's records."""
    file = piece.file
    images = file.images if file.images is not None else options.images
    folder = Path(file.path).parent if images is None else Path(images)
    context = Context(options, folder, file.dataset)
    for number in map(int, piece.numbers):
        yield from samples_of(READERS[file.format], _entry(file, options, number), f"{file.label}:{number}", context)


def _entry(file: InputFile, options: ReadOptions, number: int) -> Entry:
    if (file, options) != (_Open.file, _Open.options) or number < _Open.following:
        _Open.entries = READERS[file.format].container.entries(Path(file.path), options)
        _Open.file, _Open.options, _Open.following = file, options, 0
    entry = next(itertools.islice(_Open.entries, number - _Open.following, None), None)
    _Open.following = number + 1
    if entry is None:
        _Open.file = None
        raise DataError("source", file.path, "has fewer records than it had", "start again with another --out")
    return entry


def leave_with_parent() -> None:
    """End this process, if it is a worker, as soon as its parent is gone: a killed run must not go on unseen."""
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == _WATCH for thread in threading.enumerate()):
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name=_WATCH, daemon=True).start()
