"""The files by which Megatron-Energon opens a dataset, made without it: `.nv-meta`, and a `.tar.idx` beside each shard.

They are what `energon prepare` writes for samples that the user's own cooker turns into its (`CrudeWebdataset`): the
samples of each shard (`.info.json`), which shards are trained on (`split.yaml`: all, in their order), and where each
sample and each of its members lies (`index.sqlite`, for random access and joins; `.tar.idx`, for reading in order). A
sample that our index refused is excluded, so Energon gives the samples that `read` gives.

The bytes depend on the shards alone. Shards are listed in any number of processes, and `.nv-meta` appears once it is
whole. One that somebody else made is left alone; ours is known by its id, which is derived from the shards' checksums.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import uuid
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megavlm.data.files import atomic_file, sync_folder
from megavlm.data.index import Index
from megavlm.data.pieces import OnProgress, Piece, make_pieces, pieces_of
from megavlm.data.progress import Progress
from megavlm.data.tar_format import DamagedTar, TarReader, padding
from megavlm.errors import ConfigError, DataError

VERSION = "7.4.1"
"""Of Energon, whose files these are."""
META_FOLDER, WORK_FOLDER = ".nv-meta", ".energon"
ID_FILE, DATABASE = "index.uuid", "index.sqlite"

_NAMESPACE = uuid.UUID("a5e1a0a8-1c9f-5c5e-9a38-0d4d7c1f6f10")
_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")
"""Key and ending of a member's name, as Energon tells them apart; what does not match is overlooked."""
_NOTE = re.compile(r"__[^/]*__(/|$)")
_BUFFER = 4096
"""Bytes read at once: headers stand between contents, which are passed over."""
_WORTH_PROCESSES = 50_000
"""Samples from which on processes are faster, their start included."""
_TABLES = """
CREATE TABLE samples (
    tar_file_id INTEGER NOT NULL,
    sample_key TEXT NOT NULL UNIQUE,
    sample_index INTEGER NOT NULL,
    byte_offset INTEGER,
    byte_size INTEGER
);
CREATE TABLE sample_parts (
    tar_file_id INTEGER,
    sample_index INTEGER,
    part_name TEXT,
    content_byte_offset INTEGER,
    content_byte_size INTEGER
);
"""
_INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full
    ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


def write_energon(
    folder: str | Path,
    index_folder: str | Path | None = None,
    *,
    workers: int = 0,
    on_progress: OnProgress | None = None,
) -> None:
    """Let Energon open the shards of a local folder, whose index lies there or in a folder of its own.

    Nothing is done where that was done already for the same shards, or by others.
    """
    folder = Path(folder)
    index_folder = folder if index_folder is None else Path(index_folder)
    index = Index.open(index_folder)
    id_ = _id_of(index)
    if _found_id(folder) == id_ or ((folder / META_FOLDER).exists() and not has_ours(folder)):
        return
    shutil.rmtree(folder / META_FOLDER, ignore_errors=True)
    work = folder / WORK_FOLDER
    tasks = [_ListShard(folder, index_folder, number) for number in range(len(index.shard_names))]
    processes = workers if len(index) >= _WORTH_PROCESSES else 0
    pieces = make_pieces(work / id_, {"id": id_}, tasks, processes, on_progress)
    new = work / META_FOLDER
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    _write_meta(new, id_, index.shard_names, pieces, folder)
    new.rename(folder / META_FOLDER)
    sync_folder(folder)
    shutil.rmtree(work)


def show_to_energon(folder: str | Path, index_folder: str | Path | None = None, *, workers: int = 0) -> None:
    """`write_energon` with a bar that shows its progress."""
    index = Index.open(folder if index_folder is None else index_folder)
    progress = Progress("listing", len(index), "samples")
    write_energon(folder, index_folder, workers=workers, on_progress=lambda _, samples: progress.update(samples))
    progress.finish(len(index))


def has_ours(folder: str | Path) -> bool:
    """Whether the folder holds a `.nv-meta` that was made here, of these shards or former ones."""
    try:
        return uuid.UUID(_found_id(Path(folder))).version == 5  # those of Energon are random: version 4
    except ValueError:
        return False


def check_can_write(folder: str) -> None:
    """An error, before hours of work, where `write_energon` would refuse."""
    if "://" in folder:
        remedy = "copy the shards to a local folder, or run `energon prepare`"
        raise ConfigError("--energon", folder, "is in an object store, which is only read here", remedy)


def _found_id(folder: Path) -> str:
    try:
        return (folder / META_FOLDER / ID_FILE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _id_of(index: Index) -> str:
    return str(uuid.uuid5(_NAMESPACE, json.dumps(index.shard_sums, sort_keys=True)))


@dataclass
class _Members:
    """The members of a shard, grouped to samples as Energon does."""

    keys: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """Where each sample begins, and where the last one ends."""
    samples: list[int] = field(default_factory=list)
    """Of each member: its sample; its ending, where its content begins, and its size."""
    endings: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


def _members_of(path: Path) -> _Members:
    """The members of a shard. Where it is damaged the last sample, which may lack some, is left out."""
    found, end = _Members(), 0
    with path.open("rb", buffering=_BUFFER) as file:
        try:
            for member in TarReader(file, path.stat().st_size, skip=lambda count: file.seek(count, os.SEEK_CUR)):
                end = member.offset + member.size + len(padding(member.size))
                name = _NAME.fullmatch(member.name)
                if name is None or not member.is_file or _NOTE.match(member.name):
                    continue
                if not found.keys or name[1] != found.keys[-1]:
                    found.keys.append(name[1])
                    found.starts.append(member.start)
                found.samples.append(len(found.keys) - 1)
                found.endings.append(name[2])
                found.offsets.append(member.offset)
                found.sizes.append(member.size)
            found.starts.append(end)
        except DamagedTar:
            _drop_last(found)
    return found


def _drop_last(found: _Members) -> None:
    """The last sample's start becomes the end of the one before."""
    if found.keys:
        found.keys.pop()
        kept = found.samples.index(len(found.keys))
        for column in (found.samples, found.endings, found.offsets, found.sizes):
            del column[kept:]
    else:
        found.starts.append(0)


@dataclass(frozen=True)
class _ListShard:
    """The task of listing a shard's samples, and of writing its `.tar.idx`."""

    folder: Path
    index_folder: Path
    number: int

    def __call__(self, progress: OnProgress) -> Piece:
        index = Index.open(self.index_folder)
        name = index.shard_names[self.number]
        try:
            found = _members_of(self.folder / name)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
            raise DataError("shard", str(self.folder / name), problem, "copy it again") from None
        columns = {name: np.array(getattr(found, name), np.int64) for name in ("starts", "samples", "offsets", "sizes")}
        words = index.json_offsets(self.number)
        taken = np.unique(columns["samples"][np.isin(columns["offsets"], words)])
        if len(taken) != len(words):
            remedy = f"run `megavlm data index {self.index_folder}`"
            raise DataError("shard", str(self.folder / name), "differs from its index", remedy)
        if found.keys:
            with atomic_file(self.folder / f"{name}.idx") as file:
                file.write(columns["starts"].astype("<u8").tobytes())
        refused = sorted({*range(len(found.keys))}.difference(taken.tolist()))
        progress(index.shard_bytes[name], len(words))
        return Piece({"keys": found.keys, "endings": found.endings, "refused": refused}, columns)


def _write_meta(new: Path, id_: str, names: Sequence[str], pieces: Sequence[Path], folder: Path) -> None:
    """All files of `.nv-meta`. A shard without samples, which Energon does not take, is in none of them."""
    counts: dict[str, int] = {}
    excluded: list[str] = []
    with closing(sqlite3.connect(new / DATABASE, isolation_level=None)) as database:
        database.executescript(f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; {_TABLES}")
        database.execute("BEGIN")
        for name, piece in zip(names, pieces_of(pieces), strict=True):
            keys = piece.facts["keys"]
            if keys:
                _insert(database, len(counts), piece, folder / name)
                counts[name] = len(keys)
                excluded += [f"{name}/{keys[number]}" for number in piece.facts["refused"]]
        database.execute("COMMIT")
        database.executescript(_INDEXES)
    with (new / DATABASE).open("rb") as file:
        os.fsync(file.fileno())
    info = {"energon_version": VERSION, "shard_counts": counts}
    texts = {
        ".info.json": json.dumps(info, indent=2),
        "split.yaml": _split_text(counts, excluded),
        "dataset.yaml": "__module__: megatron.energon\n__class__: CrudeWebdataset\n",
        ID_FILE: id_,
    }
    for file_name, text in texts.items():
        with atomic_file(new / file_name) as file:
            file.write(text.encode())


def _insert(database: sqlite3.Connection, shard: int, piece: Piece, path: Path) -> None:
    """The rows of a shard; DataError where a sample has the key of another one."""
    keys, endings = piece.facts["keys"], piece.facts["endings"]
    starts, samples, offsets, sizes = (piece.columns[name] for name in ("starts", "samples", "offsets", "sizes"))
    spans = zip(keys, range(len(keys)), starts[:-1].tolist(), np.diff(starts).tolist(), strict=True)
    rows = ((shard, *span) for span in spans)
    if database.executemany("INSERT OR IGNORE INTO samples VALUES (?, ?, ?, ?, ?)", rows).rowcount < len(keys):
        problem = f"its sample {_repeated(database, shard, keys)!r} has the name of another one, which Energon refuses"
        raise DataError("shard", str(path), problem, "give each a name of its own, or use `data prepare`")
    members = zip(samples.tolist(), endings, offsets.tolist(), sizes.tolist(), strict=True)
    database.executemany("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", ((shard, *member) for member in members))


def _repeated(database: sqlite3.Connection, shard: int, keys: Sequence[str]) -> str:
    """The first key of a shard that is another sample's."""
    stored = (
        database.execute("SELECT tar_file_id, sample_index FROM samples WHERE sample_key = ?", (key,)).fetchone()
        for key in keys
    )
    return next(key for number, (key, row) in enumerate(zip(keys, stored, strict=True)) if row != (shard, number))


def _split_text(counts: Iterable[str], excluded: Sequence[str]) -> str:
    """Every shard for training, in their order; names are quoted as in JSON, which is YAML as well."""
    train = _listed(counts)
    return f"split_parts:\n  train:{train}\n  val: []\n  test: []\nexclude:{_listed(excluded)}\n"


def _listed(names: Iterable[str]) -> str:
    lines = [f"\n  - {json.dumps(_without_braces(name), ensure_ascii=False)}" for name in names]
    return "".join(lines) or " []"


def _without_braces(name: str) -> str:
    """The name where braces would be expanded, as by a shell."""
    return re.sub(r"([\\{}])", r"\\\1", name)
