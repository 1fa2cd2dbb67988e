"""`megavlm data index`: the index of a folder of shards, and token counts for a tokenizer and template beside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megavlm.config import require
from megavlm.data.energon import META_FOLDER, check_can_write, has_ours, show_to_energon
from megavlm.data.index import DATASET_FILE, Index, IndexReport
from megavlm.data.index_build import build_index
from megavlm.data.look import CountWords, WordsConfig, image_token
from megavlm.data.prepare import summary
from megavlm.data.progress import Progress
from megavlm.data.store import open_store
from megavlm.data.token_counts import CountReport, add_token_counts
from megavlm.errors import DataError

MOST_NAMED = 5
"""Samples that could not be counted of which the summary says why."""


@dataclass(frozen=True, kw_only=True)
class IndexConfig(WordsConfig):
    """What is indexed."""

    into: str | None = None
    """Local folder that takes the index, where the shards are in an object store."""
    workers: int | None = None
    """Processes; by default one for each core."""
    energon: bool = False
    """Let Megatron-Energon open the folder as well: `.nv-meta`, and a small .tar.idx beside each shard. What was made
    of former shards is made anew in any case."""

    def check(self) -> None:
        require(self.workers is None or self.workers >= 1, self, "workers", "is below 1", "use 1 or more")

    @property
    def processes(self) -> int:
        """Worker processes; 0: none."""
        workers = self.workers or len(os.sched_getaffinity(0))
        return workers if workers > 1 else 0


def index_folder(folder: str, config: IndexConfig) -> str:
    """Index the shards of a folder, or count its tokens where a tokenizer is named; what was done, in words.

    Counting takes the index that is there, and makes one where there is none.
    """
    if config.energon:
        check_can_write(folder)
    done = _index_and_count(folder, config.into or folder, config)
    if config.energon or has_ours(folder):
        show_to_energon(folder, config.into, workers=config.processes)
        done.append(f"Megatron-Energon opens {folder}: {META_FOLDER} describes its shards")
    return "\n".join(done)


def _index_and_count(folder: str, into: str, config: IndexConfig) -> list[str]:
    if config.tokenizer is None:
        return [summary(_indexed(folder, config), into)]
    words = config.words  # before hours of work
    done = []
    if "://" in into or not (Path(into) / DATASET_FILE).exists():
        done.append(summary(_indexed(folder, config), into))
    index = Index.open(into)
    _check_shards(index, folder)
    if index.report.pictures:
        image_token(words.tokenizer)
    progress = Progress("counting", len(index), "samples")
    report = add_token_counts(
        into,
        CountWords(str(words.tokenizer.folder), words.chat),
        words.name,
        words.hash,
        shards=folder,
        workers=config.processes,
        on_progress=lambda _, samples: progress.update(samples),
    )
    progress.finish(report.samples)
    return [*done, *counted(words.name, report)]


def counted(name: str, report: CountReport) -> list[str]:
    """What was counted, in lines."""
    lines = [f"{name}: {report.tokens:,} tokens of text in {report.samples:,} samples, {report.targets:,} trained"]
    if report.damaged:
        lines.append(f"samples that could not be counted, which training leaves out: {len(report.damaged):,}")
        lines += [f"  {problem}" for problem in report.damaged[:MOST_NAMED]]
        if len(report.damaged) > MOST_NAMED:
            lines.append("  ... `megavlm data lint` names them all")
    return lines


def _indexed(folder: str, config: IndexConfig) -> IndexReport:
    progress = Progress("indexing", 0, "samples")
    report = build_index(
        folder, config.into, workers=config.processes, on_progress=lambda _, samples: progress.update(samples)
    )
    progress.finish(report.samples)
    return report


def _check_shards(index: Index, folder: str) -> None:
    """The shards are those of the index, by their names and sizes."""
    store = open_store(folder)
    names = store.names()
    sizes = {name: store.size(name) for name in names}
    known = index.shard_bytes
    differing = sorted(name for name in {*sizes, *known} if sizes.get(name) != known.get(name))
    if differing:
        problem = f"{len(differing)} shards differ from the index, such as {differing[0]}"
        remedy = f"copy them again, or make the index anew by `megavlm data index {folder}`"
        raise DataError("dataset", folder, problem, remedy)
