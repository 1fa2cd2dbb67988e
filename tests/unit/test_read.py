"""Reading by number: what was written, from where it lies, and what is told of damage."""

from __future__ import annotations

import mmap
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from flaky_store import FlakyFileSystem
from foreign_tars import chat, write_tar
from random_samples import RandomChunk, picture_file

from megavlm.data import store
from megavlm.data.index import Index
from megavlm.data.index_build import build_index
from megavlm.data.read import WIDEST_GAP, ShardReader
from megavlm.data.sample import Picture, Sample
from megavlm.data.shards import write_shards
from megavlm.errors import DataError

CHUNK = RandomChunk(9, 40)
SAMPLES = [sample for sample in CHUNK if isinstance(sample, Sample)]
TINY = [
    Sample("one", (Picture((picture_file(np.random.default_rng(0), "GIF", (1, 1)),)),), text="<image>a"),
    Sample("two", (), text="b"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("read") / "out"
    write_shards([CHUNK], out, target_bytes=30_000)
    return out


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_shards([TINY], tmp_path / "tiny")
    return tmp_path / "tiny"


def emptied(sample: Sample) -> Sample:
    pictures = tuple(Picture((b"",) * len(picture.files), picture.is_video) for picture in sample.pictures)
    return Sample(sample.id, pictures, sample.turns, sample.text, sample.source)


@pytest.mark.parametrize("threads", [1, 4])
def test_samples_come_in_the_order_asked_for(dataset: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST_OPEN_FILES", 2)  # files are closed under the readers' hands
    reader = ShardReader(dataset, Index.open(dataset))
    assert len(reader.index.shard_names) > 4
    chosen = np.random.default_rng(threads).integers(0, len(SAMPLES), 300)
    assert reader.read_many(chosen, threads) == [SAMPLES[n] for n in chosen]
    assert [reader.read_text(n) for n in range(len(SAMPLES))] == [emptied(sample) for sample in SAMPLES]


def test_only_the_pictures_asked_for_are_read(dataset: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset), "/pictures", recursive=True)
    reader = ShardReader("flaky://pictures", Index.open(dataset))
    for number, sample in enumerate(SAMPLES):
        files = [file for picture in sample.pictures for file in picture.files]
        assert reader.read_pictures(number) == files
        for which in ([], [len(files) - 1] if files else [], list(range(len(files)))[::-2]):
            FlakyFileSystem.reads.clear()
            assert reader.read_pictures(number, which) == [files[place] for place in which]
            read = sum(end - start for start, end in FlakyFileSystem.reads)
            assert len(FlakyFileSystem.reads) <= 1 and read >= sum(len(files[place]) for place in which)
            if len(which) == 1:
                assert read == len(files[which[0]])
        with pytest.raises(IndexError):
            reader.read_pictures(number, [len(files)])
        FlakyFileSystem.reads.clear()
        reader.read(number)
        assert len(FlakyFileSystem.reads) == 1


def test_members_far_apart_are_read_apart(tmp_path: Path) -> None:
    picture = picture_file(np.random.default_rng(0), "PNG")
    members = [("x.png", picture), ("x.mp4", bytes(2 * WIDEST_GAP)), ("x.json", chat("<image>"))]
    write_tar(tmp_path / "x.tar", members)
    build_index(tmp_path)
    fsspec.filesystem("memory").put(str(tmp_path), "/apart", recursive=True)
    FlakyFileSystem.reads.clear()
    assert ShardReader("flaky://apart", Index.open(tmp_path)).read(0).pictures[0].files == (picture,)
    assert sum(end - start for start, end in FlakyFileSystem.reads) < WIDEST_GAP


@pytest.mark.parametrize("failures", [["error"] * 2, ["short", "error"], ["short"] * 2])
def test_remote_reads_are_tried_again(tiny: Path, tmp_path: Path, failures: list[str]) -> None:
    fsspec.filesystem("memory").put(str(tiny), "/again", recursive=True)
    FlakyFileSystem.failures[:] = failures
    reader = ShardReader("flaky://again", Index.open(tiny), tries=3, first_wait=0.001)
    assert reader.read(0) == TINY[0] and not FlakyFileSystem.failures
    FlakyFileSystem.failures[:] = ["error"] * 3
    with pytest.raises(DataError, match=r"in 3 tries: RuntimeError: 503 Slow Down") as caught:
        reader.read(0)
    assert caught.value.where == "sample 0" and "flaky://again/shard-00000.tar" in str(caught.value)
    assert reader.read_many([1, 0]) == TINY[::-1]


def test_a_remote_dataset_is_indexed_into_a_local_folder(dataset: Path, tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(str(dataset), "/remote", recursive=True)
    build_index("memory://remote", tmp_path)
    index = Index.open(tmp_path)
    assert index.content_hash == Index.open(dataset).content_hash
    reader = ShardReader("memory://remote", index)
    assert reader.read_many(range(len(SAMPLES))) == SAMPLES
    fsspec.filesystem("memory").rm("/remote/shard-00001.tar")
    lost = index.shards_of(range(len(SAMPLES))) == 1
    errors = reader.read_many(range(len(SAMPLES)))
    assert [isinstance(found, DataError) for found in errors] == lost.tolist()
    assert "is missing" in str(errors[int(lost.argmax())])


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (Path.unlink, "the shard is missing"),
        (lambda path: path.write_bytes(b""), "the shard ends before byte"),
        (lambda path: (path.unlink(), path.mkdir()), "the shard cannot be read: Is a directory"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "the checksum of its text differs"),
    ],
)
def test_a_lost_shard_loses_its_samples_alone(
    dataset: Path, tmp_path: Path, damage: Callable[[Path], object], problem: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    damage(folder / "shard-00001.tar")
    index = Index.open(folder)
    found = ShardReader(folder, index).read_many(range(len(index)))
    for number, shard in enumerate(index.shards_of(range(len(index)))):
        if shard != 1:
            assert found[number] == SAMPLES[number]
            continue
        error = found[number]
        assert isinstance(error, DataError) and problem in error.problem
        assert error.where == f"sample {number}" and error.value == f"{folder}/shard-00001.tar"


def test_a_shard_cut_at_each_block(tiny: Path) -> None:
    """A sample reads as it was where its last byte is there; otherwise it is an error of its own."""
    index, path = Index.open(tiny), tiny / "shard-00000.tar"
    rows, data = index.rows([0, 1]), path.read_bytes()
    ends = [int(rows.files.offset[0] + rows.files.size[0]), int(rows.words.offset[1] + rows.words.size[1])]
    for length in [*range(0, len(data), 512), ends[0] - 1, ends[0], ends[1] - 1, ends[1]]:
        path.write_bytes(data[:length])
        found = ShardReader(tiny, index).read_many([0, 1], threads=1)
        for number, end in enumerate(ends):
            if end <= length:
                assert found[number] == TINY[number]
            else:
                error = found[number]
                assert isinstance(error, DataError) and "the shard ends before byte" in error.problem


def test_every_flipped_bit_is_found_or_touches_no_sample(tiny: Path) -> None:
    index, path = Index.open(tiny), tiny / "shard-00000.tar"
    reader, rows = ShardReader(tiny, index), index.rows([0, 1])
    owner = {}
    for number, offset, size in ((0, rows.words.offset[0], rows.words.size[0]),
                                 (0, rows.files.offset[0], rows.files.size[0]),
                                 (1, rows.words.offset[1], rows.words.size[1])):  # fmt: skip
        owner.update(dict.fromkeys(range(int(offset), int(offset + size)), number))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 5 * 512 + 1024) as content:
        for place in range(len(content)):
            for bit in range(8):
                content[place] ^= 1 << bit
                for number in (0, 1) if place in owner else (bit % 2,):
                    if owner.get(place) == number:
                        with pytest.raises(DataError, match="the checksum of its (text|picture file 0) differs"):
                            reader.read(number)
                    else:
                        assert reader.read(number) == TINY[number]
                content[place] ^= 1 << bit


def test_an_index_of_other_shards(tiny: Path, tmp_path: Path) -> None:
    """An index that asks for impossible sizes, or that describes other words, makes errors and no memory."""
    for name, value, problem in (
        ("json_size", 2**32 - 1, "an impossible size"),
        ("picture_size", 2**32 - 1, "an impossible size"),
        ("json_size", 2**24, "the shard ends before byte"),
        ("picture_size", 2**26, "the shard ends before byte"),
        ("json_block", 2**32 - 1, "the shard ends before byte"),
        ("json_crc", 0, "the checksum of its text differs"),
    ):
        folder = tmp_path / f"{name}-{value}"
        shutil.copytree(tiny, folder)
        path = folder / "index" / f"{name}.bin"
        path.write_bytes(value.to_bytes(4, "little") + path.read_bytes()[4:])
        reader = ShardReader(folder, Index.open(folder))
        tracemalloc.start()
        with pytest.raises(DataError, match=problem):
            reader.read(0)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()
        assert reader.read(1) == TINY[1]


def test_wrong_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        store.open_store("nosuchprotocol://x")
    for name, plain in (
        ("a/b.tar", True),
        ("/a", False),
        ("../a", False),
        ("a/../b", False),
        ("", False),
        ("a/", False),
    ):
        assert store.is_plain(name) is plain
