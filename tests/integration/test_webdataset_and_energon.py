"""The shards in the hands of others, and theirs in ours. Neither package is needed otherwise: without them, skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_tars import chat
from random_samples import RandomChunk, picture_file

from megavlm.data.index import Index
from megavlm.data.index_build import build_index
from megavlm.data.read import ShardReader
from megavlm.data.sample import Sample
from megavlm.data.shards import members, write_shards

CHUNKS = [RandomChunk(0, 15), RandomChunk(1, 10)]
SAMPLES = [sample for chunk in CHUNKS for sample in chunk if isinstance(sample, Sample)]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_shards(CHUNKS, tmp_path / "out", target_bytes=30_000)
    return tmp_path / "out"


def energon_prepare(folder: Path) -> None:
    """The command that the documentation of `shards` names."""
    pytest.importorskip("megatron.energon")
    command = [str(Path(sys.executable).with_name("energon")), "prepare", "--non-interactive", "--num-workers", "1"]
    command += ["--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--media-metadata-by-header"]
    subprocess.run([*command, str(folder)], check=True, capture_output=True, timeout=120)


def as_members(sample: dict[str, Any]) -> list[tuple[str, bytes]]:
    return [(name, content) for name, content in sample.items() if not name.startswith("_")]


def test_webdataset_reads_the_shards(dataset: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    shards = [str(path) for path in sorted(dataset.glob("*.tar"))]
    found = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [as_members(sample) for sample in found] == [members(sample) for sample in SAMPLES]
    assert len({sample["__key__"] for sample in found}) == len(SAMPLES)


def energon_samples(folder: Path) -> Iterator[dict[str, Any]]:
    energon = pytest.importorskip("megatron.energon")

    @energon.stateless
    def plain(sample: dict[str, Any]) -> dict[str, Any]:
        return sample

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[name-defined]
        decoder = None
        cookers = [energon.Cooker(plain)]  # noqa: RUF012

    samples = energon.get_val_dataset(
        str(folder),
        split_part="train",
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        task_encoder=Encoder(),
    )
    yield from energon.get_loader(samples)


def test_energon_reads_the_shards(dataset: Path) -> None:
    energon_prepare(dataset)
    found = {json.loads(sample["json"])["id"]: as_members(dict(sample)) for sample in energon_samples(dataset)}
    assert found == {sample.id: members(sample) for sample in SAMPLES}
    assert ShardReader(dataset, Index.open(dataset)).read_many(range(len(SAMPLES))) == SAMPLES


def test_what_energon_prepared_is_indexed(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    rng = np.random.default_rng(0)
    pictures = [picture_file(rng, "JPEG") for _ in range(12)]
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f"part-{shard}.tar")) as writer:
            for number in range(4 * shard, 4 * shard + 4):
                words = chat(f"<image>\nWhat is {number}?")
                writer.write({"__key__": f"key{number}", "jpg": pictures[number], "json": words, "txt": "more"})
    energon_prepare(tmp_path)
    report = build_index(tmp_path)
    assert (report.samples, report.pictures, report.refused, report.damaged) == (12, 12, {}, {})
    found = ShardReader(tmp_path, Index.open(tmp_path)).read_many(range(12))
    assert [sample.pictures[0].files[0] for sample in found if isinstance(sample, Sample)] == pictures
    assert all(f"What is {n}?" in found[n].turns[0].text for n in range(12))  # type: ignore[union-attr]
