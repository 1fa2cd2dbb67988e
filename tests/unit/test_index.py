"""The index: its rows, tars of others, hostile and cut ones, and any size."""

from __future__ import annotations

import json
import tarfile
import tracemalloc
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from foreign_tars import chat, special, write_tar
from random_samples import RandomChunk, folder_bytes, picture_file
from synthetic_index import HASH, make_sparse_index

from megavlm.data.headers import read_header
from megavlm.data.index import Index, format_names
from megavlm.data.index_build import build_index
from megavlm.data.read import ShardReader
from megavlm.data.sample import Sample
from megavlm.data.shards import write_shards
from megavlm.errors import ConfigError, DataError

CHUNK = RandomChunk(5, 60)
RNG = np.random.default_rng(0)
CAT, DOG = picture_file(RNG, "JPEG", (30, 20)), picture_file(RNG, "PNG", (5, 6))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("index") / "out"
    write_shards([CHUNK], out, target_bytes=60_000)
    return out


def test_rows_are_those_of_the_samples(dataset: Path) -> None:
    index = Index.open(dataset)
    samples = [sample for sample in CHUNK if isinstance(sample, Sample)]
    chosen = np.random.default_rng(1).integers(0, len(samples), 200)
    rows, pictures = index.rows(chosen), index.pictures(chosen)
    truth = [[file for picture in samples[n].pictures for file in picture.files] for n in chosen]
    headers = [read_header(file) for files in truth for file in files]
    assert np.diff(pictures.offsets).tolist() == np.diff(rows.offsets).tolist() == [len(files) for files in truth]
    assert list(zip(pictures.width, pictures.height, strict=True)) == [(h.width, h.height) for h in headers]
    assert format_names(pictures.format) == [header.format for header in headers]
    frames = [(p.is_video, place == 0) for n in chosen for p in samples[n].pictures for place in range(len(p.files))]
    assert list(zip(pictures.is_video, pictures.is_first, strict=True)) == frames
    places = np.repeat(rows.shard, np.diff(rows.offsets))
    for shard, offset, size, file in zip(places, rows.files.offset, rows.files.size, chain(*truth), strict=True):
        data = (dataset / index.shard_names[shard]).read_bytes()
        assert data[offset : offset + size] == file


def test_no_samples_and_wrong_numbers(dataset: Path) -> None:
    index = Index.open(dataset)
    assert index.pictures([]).offsets.tolist() == [0] and len(index.rows([]).shard) == 0
    for wrong in (-1, len(index)):
        with pytest.raises(IndexError):
            index.rows([0, wrong])


def test_a_dataset_can_be_indexed_anew(dataset: Path, tmp_path: Path) -> None:
    """The index of the writer and that of a later reading are the same, whoever makes it and wherever it lies."""
    for workers in (0, 2):
        into = tmp_path / str(workers)
        report = build_index(dataset, into, workers=workers)
        made, written = folder_bytes(into), folder_bytes(dataset / "index")
        assert {name: made[f"index/{name}"] for name in written} == written
        assert report == Index.open(dataset).report == Index.open(into).report
    Index.open(into).verify()


def test_killed_indexing_goes_on(tmp_path: Path) -> None:
    write_shards([CHUNK], tmp_path, target_bytes=60_000)
    expected = folder_bytes(tmp_path / "index")
    names, seen = sorted(path.name for path in tmp_path.glob("*.tar")), []

    def stop(done: int, samples: int) -> None:
        seen.append(done)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path, on_progress=stop)
    begun = sorted(path.name for path in (tmp_path / ".indexing").glob("*.npz"))
    assert 0 < len(begun) < len(names)
    build_index(tmp_path, on_progress=lambda done, samples: seen.append(done))
    assert seen[3:5] == seen[:2] and seen[-1] == sum((tmp_path / name).stat().st_size for name in names)
    assert folder_bytes(tmp_path / "index") == expected


def test_bytes_per_sample(dataset: Path) -> None:
    """An image sample costs at most 48 bytes, token counts included."""
    index = Index.open(dataset)
    first = next(n for n in range(len(index)) if len(index.pictures([n]).width) == 1)
    assert index.pictures([first]).width.size == 1
    per_sample = sum(index.columns[name].itemsize for name in ("json_block", "json_size", "json_crc", "first_picture"))
    per_picture = sum(column.itemsize for column in index.columns.values()) - per_sample
    assert per_sample + per_picture + 8 == 45
    on_disk = sum(path.stat().st_size for path in (dataset / "index").glob("*.bin"))
    assert on_disk == per_sample * len(index) + per_picture * index.report.pictures


def test_tars_of_others(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "b/part-1.tar",
        [
            ("x/1.txt", b"overlooked"),
            ("x/1.jpg", CAT),
            ("x/1.json", chat("<image>\nA?")),
            special("x", tarfile.DIRTYPE),
            ("x/._1.jpg", b"overlooked"),
            ("__notes__.json", b"overlooked"),
            ("x/2.JPEG", DOG),
            ("x/2.right.png", CAT),
            ("x/2.JSON", chat("<image><image>\nB?")),
        ],
    )
    write_tar(tmp_path / "a.tar", [("1.json", chat("C?"))], tarfile.GNU_FORMAT)
    report = build_index(tmp_path)
    assert (report.samples, report.pictures, report.refused, report.damaged) == (3, 3, {}, {})
    reader = ShardReader(tmp_path, Index.open(tmp_path))
    found = [(s.turns[0].text, [p.files[0] for p in s.pictures]) for s in map(reader.read, range(3))]
    assert found == [("C?", []), ("<image>\nA?", [CAT]), ("<image><image>\nB?", [DOG, CAT])]
    assert len({reader.read(n).id for n in range(3)}) == 3


GOOD = [("good.json", chat("Good?"))]
REFUSED: dict[str, tuple[list, str]] = {
    "outside": ([("../x.json", chat("A?"))], "leads out of its folder"),
    "deep outside": ([("a/../../x.json", chat("A?"))], "leads out of its folder"),
    "absolute": ([("/etc/x.json", chat("A?"))], "leads out of its folder"),
    "twice": ([("good.json", chat("A?"))], "comes twice in its shard"),
    "two words": ([("x.json", chat("A?")), ("x.json", chat("A?"))], "several .json"),
    "no words": ([("x.jpg", CAT)], "no .json"),
    "linked words": ([special("x.json", tarfile.SYMTYPE, "/etc/passwd"), ("x.jpg", CAT)], "no .json"),
    "linked picture": ([("x.json", chat("<image>")), special("x.jpg", tarfile.LNKTYPE, "y")], "tags and its pictures"),
    "device": ([("x.json", chat("<image>")), special("x.png", tarfile.CHRTYPE)], "tags and its pictures"),
    "more tags": ([("x.json", chat("<image><image>")), ("x.jpg", CAT)], "tags and its pictures"),
    "more pictures": ([("x.json", chat("A?")), ("x.jpg", CAT)], "tags and its pictures"),
    "empty words": ([("x.json", b"")], "no JSON"),
    "empty picture": ([("x.json", chat("<image>")), ("x.jpg", b"")], "is empty"),
    "wrong type": ([("x.json", chat("<image>")), ("x.jpg", b"%PDF-1.5")], "of no known format"),
    "cut picture": ([("x.json", chat("<image>")), ("x.jpg", CAT[:30])], "cannot be read"),
    "zero bytes": ([("x.json", chat("<image>")), ("x.jpg", bytes(4000))], "of no known format"),
    "long words": ([("x.json", b"[" + bytes(17 * 2**20))], "too long"),
    "huge picture": ([("x.json", chat("<image>")), ("x.jpg", bytes(65 * 2**20))], "too large"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_hostile_members_are_refused_and_nothing_is_written(tmp_path: Path, case: str) -> None:
    members, reason = REFUSED[case]
    folder = tmp_path / "data"
    write_tar(folder / "x.tar", [*GOOD, ("other.json", chat("Other?")), *members, ("last.json", chat("Last?"))])
    tracemalloc.start()
    report = build_index(folder)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()
    assert sum(report.refused.values()) == 1 and reason in next(iter(report.refused))
    assert report.samples == 3 and not report.damaged
    refused = json.loads((folder / "index/refused.jsonl").read_text())
    assert refused["id"].startswith("x.tar/") and reason in refused["reason"]
    reader = ShardReader(folder, Index.open(folder))
    assert [reader.read(n).turns[0].text for n in range(3)] == ["Good?", "Other?", "Last?"]
    assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", "index", "x.tar"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_cut_shard_gives_what_is_whole(tmp_path: Path) -> None:
    """Cut at each block: the samples before the cut count, save the last one; the report names the shard."""
    members = [member for n in range(3) for member in ((f"{n}.json", chat("<image>")), (f"{n}.jpg", CAT))]
    write_tar(tmp_path / "whole.tar", members, tarfile.GNU_FORMAT)
    data = (tmp_path / "whole.tar").read_bytes()
    build_index(tmp_path)
    words = Index.open(tmp_path).rows(range(3)).words
    begin = [int(offset) - 512 for offset in words.offset]
    end = begin[2] + begin[1] - begin[0]
    for length in [*range(0, end + 1024, 512), end + 1023]:
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "cut.tar").write_bytes(data[:length])
        report = build_index(folder)
        # A sample is whole where another member follows it.
        whole = sum(length >= start for start in (words.offset + words.size)[1:])
        assert (report.samples, list(report.damaged)) == (whole, ["cut.tar"]), length
        reader = ShardReader(folder, Index.open(folder))
        assert [reader.read(n).pictures[0].files[0] for n in range(whole)] == [CAT] * whole


def test_folders_that_hold_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.tar"):
        build_index(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        build_index(tmp_path / "nowhere", tmp_path)
    with pytest.raises(ConfigError, match="cannot hold its index"):
        build_index("memory://nowhere")
    with pytest.raises(DataError, match="megavlm data index"):
        Index.open(tmp_path)
    (tmp_path / "file").touch()
    write_tar(tmp_path / "x.tar", GOOD)
    with pytest.raises(ConfigError, match="cannot be written"):
        build_index(tmp_path, tmp_path / "file")


def edit(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        about = json.loads((folder / "dataset.json").read_text())
        change(about)
        (folder / "dataset.json").write_text(json.dumps(about))

    return apply


def lengthen(folder: Path) -> None:
    with (folder / "index/width.bin").open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "dataset.json").write_bytes(b"\xff"), "cannot be read"),
        (lambda folder: (folder / "dataset.json").write_text("7"), "of another kind"),
        (edit(lambda about: about.update(version=2)), "of version 2"),
        (edit(lambda about: about.update(samples=4)), "contradicts itself"),
        (edit(lambda about: about.pop("shards")), "contradicts itself"),
        (edit(lambda about: about["shards"][0].update(name="../x.tar")), "contradicts itself"),
        (edit(lambda about: about["shards"][0].update(samples=1.0)), "contradicts itself"),
        (edit(lambda about: about.update(shards=[7])), "contradicts itself"),
        (lengthen, "bytes instead of"),
        (lambda folder: (folder / "index/kind.bin").unlink(), "cannot be read"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: Callable[[Path], object], problem: str) -> None:
    write_tar(tmp_path / "x.tar", [*GOOD, ("x.json", chat("<image>")), ("x.jpg", CAT)])
    build_index(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=problem) as caught:
        Index.open(tmp_path)
    assert "run `megavlm data index" in caught.value.remedy


def test_damaged_columns_are_found(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [*GOOD, ("x.json", chat("<image>")), ("x.jpg", CAT)])
    build_index(tmp_path)
    path = tmp_path / "index/first_picture.bin"
    path.write_bytes(b"\xff" * 8)
    with pytest.raises(DataError, match="make no sense"):
        Index.open(tmp_path).pictures([0, 1])
    with pytest.raises(DataError, match="first_picture differs"):
        Index.open(tmp_path).verify()


def test_work_of_other_tars_is_not_mixed_in(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, samples: int) -> None:
        raise Killed

    write_tar(tmp_path / "x.tar", GOOD)
    with pytest.raises(Killed):
        build_index(tmp_path, on_progress=kill)
    write_tar(tmp_path / "y.tar", GOOD)
    with pytest.raises(ConfigError, match="begun with other settings or other sources"):
        build_index(tmp_path)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("samples", [40_000_000, 700_000_000])
def test_an_index_of_any_size_takes_little_memory(tmp_path: Path, samples: int) -> None:
    steps = np.random.default_rng(2).integers(0, samples // 512, 4)
    planted = (steps[:, None] * 512 + np.arange(512)).ravel()
    make_sparse_index(tmp_path, samples, planted)
    before = resident()
    index = Index.open(tmp_path)
    counts = index.token_counts("toy", HASH)
    for step in steps:
        numbers = np.arange(step * 512, (step + 1) * 512)
        pictures = index.pictures(numbers)
        assert pictures.offsets.tolist() == list(range(513))
        assert pictures.width.min() >= 100 and index.rows(numbers).words.size.min() >= 200
        assert (counts.tokens[numbers] == 2 * counts.targets[numbers]).all() and counts.targets[numbers].min() >= 25
    assert len(index) == samples and resident() - before < 200 * 2**20


def test_pages_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megavlm.data.index._MOST_RESIDENT", 2**22)
    index = make_sparse_index(tmp_path, 40_000_000, [0])
    rng, before = np.random.default_rng(3), resident()
    for _ in range(20):
        index.pictures(rng.integers(0, len(index), 512))
    assert resident() - before < 64 * 2**20
