"""Counting the tokens of a dataset for a tokenizer and template, beside its index; the shards stay as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megavlm.data.files import atomic_file, sync_folder
from megavlm.data.index import ABOUT_FILE, TOKEN_COLUMNS, Index, tokens_folder
from megavlm.data.pieces import OnProgress, Piece, make_pieces, pieces_of
from megavlm.data.read import ShardReader
from megavlm.data.sample import Sample
from megavlm.errors import DataError

Count = Callable[[Sample], tuple[int, int]]
"""A sample whose picture files are empty -> (tokens, tokens that are trained on); DataError where it makes none."""

_AT_ONCE = 20_000
_PROGRESS_STEP = 256


@dataclass(frozen=True)
class CountReport:
    """What was counted."""

    samples: int
    tokens: int
    targets: int
    damaged: list[str]
    """What is wrong with each sample that could not be counted; it keeps its place, with 0 tokens."""


def add_token_counts(
    folder: str | Path,
    count: Count,
    name: str,
    hash: str,
    *,
    shards: str | Path | None = None,
    workers: int = 0,
    on_progress: OnProgress | None = None,
) -> CountReport:
    """Count every sample and put the columns into the dataset's folder under a name, in place of any there.

    `hash` tells tokenizers and templates apart: who asks for the counts names both. `shards` is where the shards lie,
    if not in `folder`. `count` has to be picklable where there are worker processes. Killed work goes on.
    """
    index = Index.open(folder)
    final = tokens_folder(index.folder, name)
    work = final.with_name(f".{name}.counting")
    plan = {"hash": hash, "dataset": index.content_hash, "at_once": _AT_ONCE}
    place = str(shards if shards is not None else folder)
    tasks = [
        _CountSamples(index.folder, place, count, first, min(first + _AT_ONCE, len(index)))
        for first in range(0, len(index), _AT_ONCE)
    ]
    pieces = make_pieces(work, plan, tasks, workers, on_progress)
    report = _install(pieces, work, final, {"hash": hash, "dataset": index.content_hash})
    shutil.rmtree(work)
    return report


@dataclass(frozen=True)
class _CountSamples:
    """The task of counting a range of samples."""

    folder: Path
    shards: str
    count: Count
    first: int
    end: int

    def __call__(self, progress: OnProgress) -> Piece:
        index = Index.open(self.folder)
        reader = ShardReader(self.shards, index)
        sizes = index.columns["json_size"]
        columns = {name: np.zeros(self.end - self.first, np.uint32) for name in TOKEN_COLUMNS}
        damaged = []
        done = self.first
        for sample in range(self.first, self.end):
            try:
                counts = self.count(reader.read_text(sample))
            except DataError as error:
                damaged.append(str(error))
                continue
            for name, value in zip(TOKEN_COLUMNS, counts, strict=True):
                columns[name][sample - self.first] = value
            if sample + 1 - done >= _PROGRESS_STEP:
                progress(int(sizes[done : sample + 1].sum(dtype=np.int64)), sample + 1 - done)
                done = sample + 1
        progress(int(sizes[done : self.end].sum(dtype=np.int64)), self.end - done)
        return Piece({"damaged": damaged}, columns)


def _install(pieces: list[Path], work: Path, final: Path, about: dict[str, str]) -> CountReport:
    new = work / "columns"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    sums, samples, damaged = dict.fromkeys(TOKEN_COLUMNS, 0), 0, []
    with atomic_file(new / "tokens.bin") as tokens, atomic_file(new / "targets.bin") as targets:
        for piece in pieces_of(pieces):
            samples += len(piece.columns["tokens"])
            damaged += piece.facts["damaged"]
            for name, file in zip(TOKEN_COLUMNS, (tokens, targets), strict=True):
                sums[name] += int(piece.columns[name].sum(dtype=np.int64))
                file.write(piece.columns[name].astype("<u4").tobytes())
    report = CountReport(samples, sums["tokens"], sums["targets"], damaged)
    with atomic_file(new / ABOUT_FILE) as file:
        facts = {**about, "samples": samples, **sums, "damaged": len(damaged)}
        file.write(json.dumps(facts, indent=1).encode() + b"\n")
    shutil.rmtree(final, ignore_errors=True)
    new.rename(final)
    sync_folder(final.parent)
    return report
