"""Writing datasets: the same bytes whoever writes them and however often they are killed."""

from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_samples import DeadlyChunk, RandomChunk, folder_bytes, picture_file

from megavlm.data.index import Index
from megavlm.data.read import ShardReader
from megavlm.data.sample import Picture, Refusal, Sample
from megavlm.data.sample_json import MOST_JSON_BYTES
from megavlm.data.shards import WORK_FOLDER, Chunk, write_shards
from megavlm.errors import ConfigError, DataError, UnavailableError

CHUNKS = [RandomChunk(0, 12), RandomChunk(1, 0, "nothing in it"), RandomChunk(2, 7, "odd"), RandomChunk(3, 1)]
TARGET = 40_000


def samples_of(chunks: list[RandomChunk]) -> list[Sample]:
    return [sample for chunk in chunks for sample in chunk if isinstance(sample, Sample)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    write_shards(CHUNKS, out, target_bytes=TARGET, plan={"source": "toy"})
    return out


def test_what_is_written_is_read_again(dataset: Path) -> None:
    reader = ShardReader(dataset, Index.open(dataset))
    assert reader.read_many(range(len(reader.index))) == samples_of(CHUNKS)


def test_report_and_dataset_file(dataset: Path) -> None:
    again = write_shards(CHUNKS, dataset, target_bytes=TARGET, plan={"source": "toy"})
    samples = samples_of(CHUNKS)
    assert (again.samples, again.refused) == (len(samples), {"nothing in it": 1, "odd": 1})
    assert again.pictures == sum(len(picture.files) for sample in samples for picture in sample.pictures)
    shards = json.loads((dataset / "dataset.json").read_text())["shards"]
    assert [shard["name"] for shard in shards] == sorted(path.name for path in dataset.glob("*.tar"))
    assert again.bytes == sum(path.stat().st_size for path in dataset.glob("*.tar"))
    sums = subprocess.run(["sha256sum", *(s["name"] for s in shards)], cwd=dataset, capture_output=True, text=True)
    assert [line.split()[0] for line in sums.stdout.splitlines()] == [shard["sha256"] for shard in shards]
    assert [json.loads(line)["id"] for line in (dataset / "index/refused.jsonl").open()] == ["lost-1", "lost-2"]


def test_shards_keep_to_their_size(dataset: Path) -> None:
    shards = json.loads((dataset / "dataset.json").read_text())["shards"]
    assert len(shards) >= 4 and shards[0]["name"] == "shard-00000.tar"
    assert all(shard["samples"] > 0 and shard["bytes"] % 10240 == 0 for shard in shards)
    for shard in shards:
        with tarfile.open(dataset / shard["name"]) as tar:
            content = sum(512 + -(-member.size // 512) * 512 for member in tar)
        assert content + 1024 <= TARGET or shard["samples"] == 1


def test_plain_tar_reads_it(dataset: Path, tmp_path: Path) -> None:
    subprocess.run(["tar", "xf", dataset / "shard-00000.tar", "-C", tmp_path], check=True)
    words = sorted(tmp_path.glob("*.json"))
    first = samples_of(CHUNKS)[: len(words)]
    assert [path.name for path in words] == [f"000000-{n:06d}.json" for n in range(len(words))]
    assert [json.loads(path.read_text())["id"] for path in words] == [sample.id for sample in first]
    for path, sample in zip(words, first, strict=True):
        files = [file for picture in sample.pictures for file in picture.files]
        found = sorted(tmp_path.glob(f"{path.stem}.*.*"), key=lambda picture: int(picture.name.split(".")[1]))
        assert [picture.read_bytes() for picture in found] == files


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_work_goes_on_and_leaves_no_trace(dataset: Path, tmp_path: Path, workers: int) -> None:
    """Whoever writes, and however often it is killed, the bytes are the same."""
    out, flag = tmp_path / "out", tmp_path / "flag"
    deadly: list[Chunk] = [*CHUNKS[:2], DeadlyChunk(CHUNKS[2], flag), CHUNKS[3]]
    with pytest.raises(UnavailableError, match="was killed"):
        write_shards(deadly, out, target_bytes=TARGET, plan={"source": "toy"}, workers=1)
    assert not list(out.glob("*.tar")) and not (out / "dataset.json").exists()
    with pytest.raises(DataError, match="holds no dataset.json"):
        Index.open(out)
    kept = {path: path.stat().st_mtime_ns for path in (out / WORK_FOLDER).glob("000000*")}
    assert len(kept) > 2
    seen: list[tuple[int, int]] = []
    write_shards(
        deadly,
        out,
        target_bytes=TARGET,
        plan={"source": "toy"},
        workers=workers,
        on_progress=lambda done, samples: seen.append((done, samples)),
    )
    assert folder_bytes(out) == folder_bytes(dataset)
    assert seen == sorted(seen) and seen[-1][1] == len(samples_of(CHUNKS)) and seen[0][1] >= 12


def test_work_killed_while_shards_get_their_names(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    rename = Path.rename

    def renamed_twice(path: Path, target: Path) -> Path:
        if target.name == "shard-00002.tar":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(Path, "rename", renamed_twice)
        write_shards(CHUNKS, out, target_bytes=TARGET, plan={"source": "toy"})
    assert len(list(out.glob("*.tar"))) == 2
    write_shards(CHUNKS, out, target_bytes=TARGET, plan={"source": "toy"})
    assert folder_bytes(out) == folder_bytes(dataset)


def test_other_settings_are_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="made with other settings"):
        write_shards(CHUNKS, dataset, target_bytes=TARGET, plan={"source": "other"})
    with pytest.raises(UnavailableError):
        write_shards([DeadlyChunk(CHUNKS[0], tmp_path / "flag")], tmp_path / "out", workers=1)
    with pytest.raises(ConfigError, match="begun with other settings"):
        write_shards([CHUNKS[0]], tmp_path / "out", target_bytes=7)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        write_shards(CHUNKS, tmp_path / "used")


def test_samples_that_are_refused(tmp_path: Path) -> None:
    picture = Picture((picture_file(np.random.default_rng(0), "PNG"),))
    good = Sample("good", (picture,), text="<image>A cat.")
    chunk: list[Sample | Refusal] = [
        Refusal("read", "no such file"),
        replace(good, id="tags", text="<image><image>"),
        replace(good, id="empty", pictures=(Picture((b"",)),)),
        replace(good, id="svg", pictures=(Picture((b"<svg>",)),)),
        replace(good, id="cut", pictures=(Picture((picture.files[0][:20],)),)),
        replace(good, id="surrogate", text="<image>\udc80"),
        replace(good, id="long", text="<image>" + "a" * MOST_JSON_BYTES),
        good,
    ]
    report = write_shards([chunk], tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/index/refused.jsonl").open()]
    assert [line["id"] for line in lines] == ["read", "tags", "empty", "svg", "cut", "surrogate", "long"]
    assert report.samples == 1 and sum(report.refused.values()) == 7
    assert "a picture file is of no known format" in report.refused
    assert ShardReader(tmp_path / "out", Index.open(tmp_path / "out")).read(0) == good
