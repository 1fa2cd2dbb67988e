"""Prepare: from what people have to shards and their index, by several processes, in a way that may be killed.

Chunks are cut by numbers of records over the whole input, so the output holds no trace of how many processes worked.
The records of each file are counted first, which finds files that can't be used before anything is written, and lets
several processes share one file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megavlm.config import Config, require
from megavlm.data.energon import show_to_energon
from megavlm.data.files import atomic_file
from megavlm.data.index import DATASET_FILE, INDEX_FOLDER, REFUSED_FILE, Index, IndexReport
from megavlm.data.mixture import load_mixture
from megavlm.data.prepare_plan import (
    Counted,
    InputFile,
    Source,
    count_records,
    input_files,
    leave_with_parent,
    make_chunks,
)
from megavlm.data.progress import Progress
from megavlm.data.readers.base import MIB, ReadOptions
from megavlm.data.readers.registry import READERS
from megavlm.data.shards import WORK_FOLDER, write_shards
from megavlm.errors import ConfigError, DataError, UnavailableError

COUNTS_FILE, LOCK_FILE = "counts.json", "lock"


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Config):
    """What is prepared, and how."""

    out: str | None = None
    """Folder that the shards and their index are written to."""
    format: str | None = None
    """Format of the sources, where looking inside does not tell it."""
    recipe: str | None = None
    """A mixture in LLaVA's form (YAML): data sets, and which of their records are taken."""
    workers: int | None = None
    """Processes; by default one for each core."""
    shard_size: int = 1024
    """MiB that a shard has at most, unless one sample alone has more."""
    chunk_records: int = 10_000
    """Records that one process works on at a time. Each chunk makes shards of its own."""
    seed: int = 1234
    """Seed of random:N in a mixture."""
    energon: bool = True
    """Whether the folder opens in Megatron-Energon as well: `.nv-meta`, and a small .tar.idx beside each shard."""
    read: ReadOptions = field(default_factory=ReadOptions)
    """What readers may take."""

    def check(self) -> None:
        for name in ("shard_size", "chunk_records"):
            require(getattr(self, name) >= 1, self, name, "must be at least 1", "use a positive number")
        require(self.workers is None or self.workers >= 1, self, "workers", "is below 1", "use a positive number")
        known = self.format is None or self.format in READERS
        require(known, self, "format", "is no format", f"use one of {', '.join(READERS)}")

    @property
    def processes(self) -> int:
        """Processes that work."""
        return self.workers if self.workers is not None else len(os.sched_getaffinity(0))


def prepare(sources: Sequence[str], config: PrepareConfig) -> IndexReport:
    """Prepare the sources, and those of the mixture, into one folder; where that was done already, its report."""
    report = _prepared(sources, config)
    if config.energon and report.samples:
        show_to_energon(_out(config), workers=_pool(config))
    return report


def _prepared(sources: Sequence[str], config: PrepareConfig) -> IndexReport:
    wanted = _wanted(sources, config)
    files = input_files(wanted)
    plan = _plan(wanted, files, config)
    out = _out(config)
    if (report := _finished(out, plan)) is not None:
        return report
    with _locked(out):
        counts = _counts(out, files, plan["files"], config)
        chunks = make_chunks(wanted, files, counts, config.read, config.chunk_records, config.seed)
        total = sum(map(len, chunks))
        progress = Progress("preparing", total, "records")
        report = write_shards(
            chunks,
            out,
            target_bytes=config.shard_size * MIB,
            plan=plan,
            workers=_pool(config),
            on_progress=lambda _, samples: progress.update(samples),
        )
        progress.finish(total)
    return report


def _pool(config: PrepareConfig) -> int:
    """Worker processes; 0: none."""
    return config.processes if config.processes > 1 else 0


def _out(config: PrepareConfig) -> Path:
    if config.out is None:
        raise ConfigError("--out", None, "is missing", "name the folder to write to")
    return Path(config.out)


def _wanted(sources: Sequence[str], config: PrepareConfig) -> list[Source]:
    found = [Source(path, config.format) for path in sources]
    for number, path in enumerate(sources):
        if os.path.realpath(path) in map(os.path.realpath, sources[:number]):
            raise ConfigError("source", path, "is given twice", "leave one out, or write a mixture (--recipe)")
    if config.recipe is not None:
        for entry in load_mixture(config.recipe).datasets:
            if entry.format is not None and entry.format not in READERS:
                raise ConfigError("format", entry.format, "is no format", f"use one of {', '.join(READERS)}")
            found.append(Source(entry.json_path, entry.format or config.format, entry.images, entry.sampling_strategy))
    if not found:
        raise ConfigError("SOURCE", None, "is missing", "name files or folders, or a mixture by --recipe")
    return found


def _plan(sources: Sequence[Source], files: Sequence[InputFile], config: PrepareConfig) -> dict[str, Any]:
    """What decides all that is written: with the same plan, work that was broken off is gone on with."""
    listed = json.dumps(files).encode()
    settings = config.to_dict()
    for name in ("out", "workers", "energon"):  # which change nothing in shards and index
        del settings[name]
    return {
        "sources": [source._asdict() for source in sources],
        "files": hashlib.sha256(listed).hexdigest(),
        "settings": settings,
    }


def _finished(out: Path, plan: dict[str, Any]) -> IndexReport | None:
    """The report of an earlier run; an error, before any work is done, where the folder holds something else."""
    if (out / DATASET_FILE).exists():
        index = Index.open(out)
        known = index.plan or {}
        if any(known.get(name) != value for name, value in json.loads(json.dumps(plan)).items()):
            problem = "holds a dataset that was made with other settings or from other sources"
            raise ConfigError("--out", str(out), problem, "give another folder")
        return index.report
    if out.exists() and not (out.is_dir() and ((out / WORK_FOLDER).is_dir() or not any(out.iterdir()))):
        raise ConfigError("--out", str(out), "is not empty", "give another folder")
    return None


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The output folder for this run alone."""
    try:
        (out / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = (out / WORK_FOLDER / LOCK_FILE).open("w")
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
        raise ConfigError("--out", str(out), problem, "give a folder that you may write to") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = "is being written by another process"
            raise ConfigError("--out", str(out), problem, "wait for it, or give another folder") from None
        yield


def _counts(out: Path, files: Sequence[InputFile], mark: str, config: PrepareConfig) -> list[Counted]:
    """The records of each file; counted once, also where the run is continued."""
    note = out / WORK_FOLDER / COUNTS_FILE
    if note.exists():
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["files"] == mark:
            return [Counted(*counted) for counted in known["counts"]]
    counts = _count_all(files, config)
    with atomic_file(note) as file:
        file.write(json.dumps({"files": mark, "counts": counts}).encode())
    return counts


def _count_all(files: Sequence[InputFile], config: PrepareConfig) -> list[Counted]:
    progress = Progress("counting", len(files), "files")
    counts: list[Counted] = []
    count = partial(count_records, options=config.read)
    processes = min(config.processes, len(files))
    if processes == 1:
        for file in files:
            counts.append(count(file))
            progress.update(len(counts))
    else:
        context = multiprocessing.get_context("spawn")  # pyarrow has threads, which a fork would lose
        try:
            with ProcessPoolExecutor(processes, context, initializer=leave_with_parent) as pool:
                for counted in pool.map(count, files, chunksize=4):
                    counts.append(counted)
                    progress.update(len(counts))
        except BrokenProcessPool:
            problem = "was killed, perhaps for want of memory"
            raise UnavailableError("a worker", None, problem, "run again with fewer --workers") from None
    progress.finish(len(counts))
    return counts


def check_worth(report: IndexReport, out: str) -> None:
    """An error where every record was refused."""
    if report.samples == 0:
        place = os.path.join(out, INDEX_FOLDER, REFUSED_FILE)
        problem = f"holds no sample: every record was refused, as {place} says"
        raise DataError("--out", out, problem, "look at the reasons there, at --images and at --format")


def summary(report: IndexReport, out: str) -> str:
    """The report in words."""
    lines = [f"{report.samples:,} samples with {report.pictures:,} pictures, {report.bytes:,} bytes, in {out}"]
    if report.refused:
        place = os.path.join(out, INDEX_FOLDER, REFUSED_FILE)
        lines.append(f"{sum(report.refused.values()):,} refused, listed in {place}:")
        most_first = sorted(report.refused.items(), key=lambda item: (-item[1], item[0]))
        lines += [f"{count:>12,}  {reason}" for reason, count in most_first]
    lines += [f"damaged: {name}: {problem}" for name, problem in report.damaged.items()]
    return "\n".join(lines)
