"""Indexes of any size without their datasets: columns that are holes, but for the samples that a test looks at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from megavlm.data.index import (
    ABOUT_FILE,
    DATASET_FILE,
    FORMAT,
    INDEX_FOLDER,
    TOKEN_COLUMNS,
    VERSION,
    Index,
    tokens_folder,
)
from megavlm.data.scan import COLUMNS, KIND_FIRST

HASH = "synthetic"


def make_sparse_index(
    folder: Path, samples: int, planted: ArrayLike, *, per_shard: int = 10_000, seed: int = 0, tokens: str = "toy"
) -> Index:
    """An index of so many one-image samples in which the `planted` ones have sizes, places and token counts.

    Their sides are 100 to 2000 pixels, their texts 50 to 1000 tokens, half of them targets. All else is zero; only the
    pages that hold planted samples take space. The token counts have the given name and HASH.
    """
    rows = np.unique(np.asarray(planted, dtype=np.int64))
    assert samples % per_shard == 0 and rows[-1] < samples
    paths = {name: folder / INDEX_FOLDER / f"{name}.bin" for name in COLUMNS}
    token_files = tokens_folder(folder, tokens)
    token_files.mkdir(parents=True)
    kinds = {paths[name]: kind for name, kind in COLUMNS.items()}
    kinds |= {token_files / f"{name}.bin": "u4" for name in TOKEN_COLUMNS}
    for path, kind in kinds.items():
        with path.open("wb") as file:
            file.truncate(samples * np.dtype(kind).itemsize)
    rng = np.random.default_rng(seed)
    place = rows % per_shard  # one image a sample: its picture row is its own number
    values = {
        paths["json_block"]: place * 400,
        paths["json_size"]: rng.integers(200, 2000, len(rows)),
        paths["picture_block"]: place * 400 + 5,
        paths["picture_size"]: rng.integers(10_000, 200_000, len(rows)),
        paths["width"]: rng.integers(100, 2000, len(rows)),
        paths["height"]: rng.integers(100, 2000, len(rows)),
        paths["kind"]: np.full(len(rows), KIND_FIRST),
    }
    values[token_files / "tokens.bin"] = 2 * rng.integers(25, 500, len(rows))
    values[token_files / "targets.bin"] = values[token_files / "tokens.bin"] // 2
    for path, column in values.items():
        np.memmap(path, kinds[path], mode="r+")[rows] = column
    first_picture = np.memmap(paths["first_picture"], COLUMNS["first_picture"], mode="r+")
    for neighbour in (0, 1):  # a sample's pictures end where the next one's begin
        inside = rows[place + neighbour < per_shard] + neighbour
        first_picture[inside] = inside % per_shard
    _write_about(folder, samples, per_shard)
    index = Index.open(folder)
    about = {"hash": HASH, "dataset": index.content_hash}
    (token_files / ABOUT_FILE).write_text(json.dumps(about))
    return index


def _write_about(folder: Path, samples: int, per_shard: int) -> None:
    shard = {"bytes": per_shard * 400 * 512, "sha256": "", "samples": per_shard, "pictures": per_shard}
    shards = [{"name": f"shard-{number:05d}.tar", **shard} for number in range(samples // per_shard)]
    about = {
        "format": FORMAT,
        "version": VERSION,
        "samples": samples,
        "pictures": samples,
        "bytes": samples * 400 * 512,
        "refused": {},
        "damaged": {},
        "columns": dict.fromkeys(COLUMNS, ""),
        "shards": shards,
    }
    (folder / DATASET_FILE).write_text(json.dumps(about))
