"""Making the index of a dataset: shard by shard, the rows of finished shards kept on disk, then appended to columns.

No more than one shard's rows are in memory in each process. Killed work goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megavlm.data.files import atomic_file, sync_folder
from megavlm.data.index import DATASET_FILE, FORMAT, INDEX_FOLDER, REFUSED_FILE, TOKENS_FOLDER, VERSION, IndexReport
from megavlm.data.pieces import OnProgress, Piece, make_pieces, pieces_of, read_facts
from megavlm.data.sample import Refusal
from megavlm.data.scan import COLUMNS, ShardRows, scan_shard
from megavlm.data.store import open_store
from megavlm.errors import ConfigError, DataError

WORK_FOLDER = ".indexing"


def build_index(
    folder: str | Path, into: str | Path | None = None, *, workers: int = 0, on_progress: OnProgress | None = None
) -> IndexReport:
    """Index the tars in and under a folder, anybody's, and replace the index that is there.

    `into` is the local folder that takes the index: needed where `folder` is the URL of an object store. Where the
    shards are those of the index that is replaced, what cannot be seen in them stays: what they were prepared from,
    what was refused then, token counts. Of a damaged archive the samples before its damage are taken; the report names
    it.
    """
    if into is None and "://" in str(folder):
        raise ConfigError("dataset", str(folder), "cannot hold its index", "give a local folder for the index")
    into = Path(folder if into is None else into)
    store = open_store(folder)
    names = store.names()
    if not names:
        raise DataError("dataset", str(folder), "holds no .tar", "check the path, or unpack what is compressed")
    work = into / WORK_FOLDER
    plan = {"folder": str(folder), "shards": [[name, store.size(name)] for name in names]}
    pieces = make_pieces(work, plan, [_IndexShard(str(folder), name) for name in names], workers, on_progress)
    report = install_index(pieces, names, work, into, plan=None, former=_former(work, into))
    shutil.rmtree(work)
    return report


@dataclass(frozen=True)
class _IndexShard:
    """The task of indexing one shard."""

    folder: str
    name: str

    def __call__(self, progress: OnProgress) -> Piece:
        return piece_of([scan_shard(open_store(self.folder), self.name, progress)], [])


def piece_of(shards: Sequence[ShardRows], refused: Sequence[tuple[str, str]]) -> Piece:
    """The index's part for these shards, with what was refused before it came to a shard."""
    facts = [
        {
            "name": rows.name,
            "bytes": rows.bytes,
            "sha256": rows.sha256,
            "samples": rows.samples,
            "pictures": rows.pictures,
            "damage": rows.damage,
        }
        for rows in shards
    ]
    lost = [*refused, *(entry for rows in shards for entry in rows.refused)]
    columns = {
        name: np.concatenate([np.zeros(0, kind), *(rows.columns[name] for rows in shards)])
        for name, kind in COLUMNS.items()
    }
    return Piece({"shards": facts, "refused": lost}, columns)


def shards_of(piece: Path) -> list[dict[str, Any]]:
    """What a piece says of its shards."""
    shards: list[dict[str, Any]] = read_facts(piece)["shards"]
    return shards


def install_index(
    pieces: Sequence[Path],
    names: Sequence[str],
    work: Path,
    folder: Path,
    plan: Mapping[str, Any] | None,
    former: Mapping[str, Any] | None = None,
) -> IndexReport:
    """Append the pieces to columns and put these into the folder, with the shards under these names.

    The folder has no `dataset.json` while its index is exchanged: what is interrupted is no dataset. `former` is the
    one of the index that is replaced.
    """
    new, index = work / INDEX_FOLDER, folder / INDEX_FOLDER
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    about = {"format": FORMAT, "version": VERSION, **_merge(pieces, names, new)}
    if plan is not None:
        about["plan"] = dict(plan)
    if former is not None and former.get("shards") == about["shards"]:
        about |= _keep(former, index, new)
    if (folder / DATASET_FILE).exists():
        (folder / DATASET_FILE).replace(work / DATASET_FILE)  # found there, should this be killed before the end
    shutil.rmtree(index, ignore_errors=True)
    new.rename(index)
    sync_folder(folder)
    with atomic_file(folder / DATASET_FILE) as file:
        file.write(json.dumps(about, indent=1).encode() + b"\n")
    return IndexReport(about["samples"], about["pictures"], about["bytes"], about["refused"], about["damaged"])


def _former(work: Path, folder: Path) -> dict[str, Any] | None:
    """The `dataset.json` that is replaced, where there is one that can be read."""
    for path in (folder / DATASET_FILE, work / DATASET_FILE):
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(about, dict):
            return about
    return None


def _keep(former: Mapping[str, Any], index: Path, new: Path) -> dict[str, Any]:
    """Take over into a new index of the same shards what the old one alone can tell; the entries about it."""
    kept = {"plan": former["plan"]} if "plan" in former else {}
    if (index / REFUSED_FILE).is_file() and isinstance(former.get("refused"), dict):
        shutil.copyfile(index / REFUSED_FILE, new / REFUSED_FILE)
        kept["refused"] = former["refused"]
    if (index / TOKENS_FOLDER).is_dir():
        shutil.copytree(index / TOKENS_FOLDER, new / TOKENS_FOLDER)  # each says itself which samples it is of
    return kept


def _merge(pieces: Sequence[Path], names: Sequence[str], new: Path) -> dict[str, Any]:
    shards: list[dict[str, Any]] = []
    refused: Counter[str] = Counter()
    sums = {name: hashlib.sha256() for name in COLUMNS}
    with ExitStack() as stack:
        files = {name: stack.enter_context(atomic_file(new / f"{name}.bin")) for name in COLUMNS}
        lines = stack.enter_context(atomic_file(new / REFUSED_FILE))
        for piece in pieces_of(pieces):
            shards += piece.facts["shards"]
            for name, kind in COLUMNS.items():
                data = piece.columns[name].astype(np.dtype(kind).newbyteorder("<")).tobytes()
                sums[name].update(data)
                files[name].write(data)
            for id_, reason in piece.facts["refused"]:
                refused[Refusal(id_, reason).kind] += 1
                lines.write(json.dumps({"id": id_, "reason": reason}).encode() + b"\n")
    damaged = {name: shard["damage"] for name, shard in zip(names, shards, strict=True) if shard["damage"]}
    kept = ("bytes", "sha256", "samples", "pictures")
    return {
        **{key: sum(shard[key] for shard in shards) for key in ("samples", "pictures", "bytes")},
        "refused": dict(sorted(refused.items())),
        "damaged": damaged,
        "columns": {name: sums[name].hexdigest() for name in COLUMNS},
        "shards": [
            {"name": name, **{key: shard[key] for key in kept}} for name, shard in zip(names, shards, strict=True)
        ],
    }
