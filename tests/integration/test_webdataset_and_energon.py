"""The shards in the hands of others, and theirs in ours. Neither package is needed otherwise: without them, skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from energon_reference import REFERENCE, energon_prepare, files_in, write_tars
from foreign_tars import chat
from random_samples import RandomChunk, picture_file
from toy_data import write_tokenizer

from megavlm.cli import main
from megavlm.data.energon import write_energon
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


def as_members(sample: dict[str, Any]) -> list[tuple[str, bytes]]:
    return [(name, content) for name, content in sample.items() if not name.startswith("_")]


def test_webdataset_reads_the_shards(dataset: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    shards = [str(path) for path in sorted(dataset.glob("*.tar"))]
    found = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [as_members(sample) for sample in found] == [members(sample) for sample in SAMPLES]
    assert len({sample["__key__"] for sample in found}) == len(SAMPLES)


def energon_settings(energon: Any) -> dict[str, Any]:
    """What a loader needs that gives samples as they are, in one process."""

    @energon.stateless
    def plain(sample: dict[str, Any]) -> dict[str, Any]:
        return sample

    class Encoder(energon.DefaultTaskEncoder):
        decoder = None
        cookers = [energon.Cooker(plain)]  # noqa: RUF012

    worker = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    return {"worker_config": worker, "batch_size": None, "task_encoder": Encoder()}


def in_order(folder: Path) -> Iterator[dict[str, Any]]:
    """The samples of a folder as Energon reads them, once and unshuffled."""
    energon = pytest.importorskip("megatron.energon")
    samples = energon.get_val_dataset(str(folder), split_part="train", **energon_settings(energon))
    yield from energon.get_loader(samples)


def test_energon_opens_what_is_prepared(dataset: Path) -> None:
    energon = pytest.importorskip("megatron.energon")
    write_energon(dataset)
    assert [as_members(dict(sample)) for sample in in_order(dataset)] == [members(sample) for sample in SAMPLES]
    assert ShardReader(dataset, Index.open(dataset)).read_many(range(len(SAMPLES))) == SAMPLES
    training = energon.get_train_dataset(
        str(dataset), shuffle_buffer_size=None, max_samples_per_sequence=None, **energon_settings(energon)
    )
    once = [as_members(dict(sample)) for sample in islice(energon.get_loader(training), len(SAMPLES))]
    assert sorted(map(str, once)) == sorted(str(members(sample)) for sample in SAMPLES)


def test_energon_finds_a_member_by_its_name(dataset: Path) -> None:
    file_store = pytest.importorskip("megatron.energon.cache.file_store")
    epath = pytest.importorskip("megatron.energon.epathlib")
    write_energon(dataset)
    store = file_store.WebdatasetFileStore(epath.EPath(str(dataset)))
    for chunk, place in ((0, 3), (1, 9)):
        sample = SAMPLES[15 * chunk + place]
        for ending, content in members(sample):
            assert store[f"{chunk:06d}-{place:06d}.{ending}"][0] == content


def test_energon_leaves_out_what_the_index_refused(tmp_path: Path) -> None:
    write_tars(tmp_path)
    tar = tmp_path / "a.tar"
    tar.rename(tmp_path / "a{1..2}.tar")  # whose name `energon prepare` would take for two
    report = build_index(tmp_path)
    write_energon(tmp_path)
    found = list(in_order(tmp_path))
    expected = ShardReader(tmp_path, Index.open(tmp_path)).read_many(range(report.samples))
    assert [sample["json"] for sample in found] == [words_of(tmp_path, number) for number in range(len(expected))]


def words_of(folder: Path, number: int) -> bytes:
    """The JSON member of a sample, as it stands in its shard."""
    index = Index.open(folder)
    rows = index.rows([number])
    data = (folder / index.shard_names[int(rows.shard[0])]).read_bytes()
    return data[int(rows.words.offset[0]) :][: int(rows.words.size[0])]


def test_the_reference_is_what_energon_prepares(tmp_path: Path) -> None:
    energon = pytest.importorskip("megatron.energon")
    write_tars(tmp_path)
    energon_prepare(tmp_path)
    found = files_in(tmp_path)
    found["info"]["energon_version"] = "7.4.1"
    assert found == json.loads(REFERENCE.read_text(encoding="utf-8")), energon.__version__


def test_what_energon_prepared_can_be_trained_on(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    pytest.importorskip("megatron.energon")
    rng = np.random.default_rng(0)
    folder, tokenizer = tmp_path / "theirs", str(write_tokenizer(tmp_path / "tokenizer").folder)
    folder.mkdir()
    pictures = [picture_file(rng, "JPEG") for _ in range(12)]
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"part-{shard}.tar")) as writer:
            for number in range(4 * shard, 4 * shard + 4):
                words = chat(f"<image>\nWhat is {number}?")
                writer.write({"__key__": f"key{number}", "jpg": pictures[number], "json": words, "txt": "more"})
    energon_prepare(folder)
    assert main(["data", "index", str(folder), "--tokenizer", tokenizer, "--workers", "1"]) == 0
    report = Index.open(folder).report
    assert (report.samples, report.pictures, report.refused, report.damaged) == (12, 12, {}, {})
    found = ShardReader(folder, Index.open(folder)).read_many(range(12))
    assert [sample.pictures[0].files[0] for sample in found if isinstance(sample, Sample)] == pictures
    assert all(f"What is {n}?" in found[n].turns[0].text for n in range(12))  # type: ignore[union-attr]
    assert main(["data", "lint", str(folder), "--tokenizer", tokenizer, "--grid", "2/3"]) == 0
