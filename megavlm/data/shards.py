"""Writing prepared datasets: WebDataset tars with a side index, the same bytes however many processes write them.

The input comes as chunks, fixed pieces of it such as a file or a range of lines, each of which gives the same samples
whenever it is read. A chunk makes shards of its own, so neither the number of processes nor when they were killed can
be seen in the output. A chunk that gives several times `target_bytes` wastes little on its last, smaller shard. While
the work lasts it lies in `.preparing` of the output folder; the same call goes on with the first missing chunk. At the
end the shards are numbered `shard-00000.tar` and so on, in the order of the chunks.

A sample is `<key>.json` (see `sample_json`) and `<key>.<n>.<ending>` for its picture files, the ending told by their
first bytes. A key is `<chunk>-<number within it>`: unique in the dataset, without a dot, as Energon wants it; the
sample's own id, which may be anything, stands in its JSON. Plain tar, webdataset and this package read a folder as it
is; `energon` adds what Megatron-Energon wants beside the shards.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megavlm.data.files import atomic_file, sync_folder
from megavlm.data.headers import read_header
from megavlm.data.index import DATASET_FILE, Index, IndexReport
from megavlm.data.index_build import install_index, piece_of, shards_of
from megavlm.data.pieces import OnProgress, Piece, make_pieces
from megavlm.data.sample import Refusal, Sample
from megavlm.data.sample_json import check_words, encode_words
from megavlm.data.scan import ShardRows, scan_shard
from megavlm.data.store import LocalStore
from megavlm.data.tar_format import BLOCK, END, RECORD, member_header, padding
from megavlm.errors import ConfigError

Chunk = Iterable[Sample | Refusal]
"""A part of the input; picklable where there are worker processes."""
TARGET_BYTES = 2**30
"""A shard ends before the sample that would make it larger."""
WORK_FOLDER = ".preparing"


def members(sample: Sample) -> list[tuple[str, bytes]]:
    """(ending, content) of a sample's members; ValueError with the reason where the sample is refused."""
    check_words(sample)
    found = [("json", encode_words(sample))]
    for number, file in enumerate(file for picture in sample.pictures for file in picture.files):
        found.append((f"{number}.{read_header(file).format}", file))
    return found


class ShardWriter:
    """A tar shard, whose bytes depend on its samples alone; it appears when the block ends, whole."""

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        self._file = self._stack.enter_context(atomic_file(path))
        self.bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.write(END + padding(self.bytes + len(END), RECORD))
        self._stack.__exit__(kind, error, trace)

    def add(self, key: str, parts: Sequence[tuple[str, bytes]]) -> None:
        """Append a sample, given as its `members`."""
        for ending, content in parts:
            self._file.write(member_header(f"{key}.{ending}", len(content)))
            self._file.write(content)
            self._file.write(padding(len(content)))
        self.bytes += tar_bytes(parts)


def tar_bytes(parts: Sequence[tuple[str, bytes]]) -> int:
    """Bytes of a sample's members in a shard."""
    return sum(BLOCK + len(content) + len(padding(len(content))) for _, content in parts)


def write_shards(
    chunks: Sequence[Chunk],
    out: str | Path,
    *,
    target_bytes: int = TARGET_BYTES,
    plan: Mapping[str, Any] | None = None,
    workers: int = 0,
    on_progress: OnProgress | None = None,
) -> IndexReport:
    """Write a dataset into the folder `out`, with its index, in `workers` processes or, with 0, in this one.

    `plan` names what the samples depend on (sources, settings of their reader), as JSON: unfinished work is gone on
    with, and a finished dataset left as it is, only where plan, target and number of chunks are the same.
    """
    out = Path(out)
    work = out / WORK_FOLDER
    full_plan = json.loads(json.dumps({**(plan or {}), "chunks": len(chunks), "target_bytes": target_bytes}))
    if (out / DATASET_FILE).exists():
        return _finished(out, full_plan)
    if out.exists() and any(out.iterdir()) and not work.exists():
        raise ConfigError("output folder", str(out), "is not empty", "give another folder")
    tasks = [_WriteChunk(chunk, number, work, target_bytes) for number, chunk in enumerate(chunks)]
    pieces = make_pieces(work, full_plan, tasks, workers, on_progress)
    names = _name_shards(pieces, work, out)
    report = install_index(pieces, names, work, out, full_plan)
    shutil.rmtree(work)
    return report


def _finished(out: Path, plan: Mapping[str, Any]) -> IndexReport:
    index = Index.open(out)
    if index.plan != plan:
        problem = "holds a dataset that was made with other settings or from other sources"
        raise ConfigError("output folder", str(out), problem, "give another folder")
    shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)  # the last run may have been killed just before
    return index.report


@dataclass(frozen=True)
class _WriteChunk:
    """The task of writing a chunk's shards."""

    chunk: Chunk
    number: int
    folder: Path
    target_bytes: int

    def __call__(self, progress: OnProgress) -> Piece:
        refused: list[tuple[str, str]] = []
        found: list[ShardRows] = []
        samples, written = _accepted(self.chunk, refused), 0
        waiting = next(samples, None)
        while waiting is not None:
            name = f"{self.number:06d}-{len(found):03d}.tar"
            with ShardWriter(self.folder / name) as writer:
                while waiting is not None and (not writer.bytes or self._fits(writer, waiting)):
                    writer.add(f"{self.number:06d}-{written:06d}", waiting)
                    progress(tar_bytes(waiting), 1)
                    written += 1
                    waiting = next(samples, None)
            # What stands on disk is what the index describes, so it is made like any other index.
            found.append(scan_shard(LocalStore(str(self.folder)), name))
        assert sum(rows.samples for rows in found) == written, "a sample that was written is not understood"
        return piece_of(found, refused)

    def _fits(self, writer: ShardWriter, parts: Sequence[tuple[str, bytes]]) -> bool:
        return writer.bytes + tar_bytes(parts) + len(END) <= self.target_bytes


def _accepted(chunk: Chunk, refused: list[tuple[str, str]]) -> Iterator[list[tuple[str, bytes]]]:
    """The members of each sample of a chunk; what is refused goes onto the list."""
    for sample in chunk:
        if isinstance(sample, Refusal):
            refused.append((sample.id, sample.reason))
            continue
        try:
            yield members(sample)
        except ValueError as reason:
            refused.append((sample.id, str(reason)))


def _name_shards(pieces: Sequence[Path], work: Path, out: Path) -> list[str]:
    """Give the shards their final names; those that have them already are left."""
    working = [shard["name"] for piece in pieces for shard in shards_of(piece)]
    digits = max(5, len(str(len(working) - 1)))
    names = [f"shard-{number:0{digits}d}.tar" for number in range(len(working))]
    for old, new in zip(working, names, strict=True):
        if (work / old).exists():
            (work / old).rename(out / new)
    sync_folder(out)
    return names
