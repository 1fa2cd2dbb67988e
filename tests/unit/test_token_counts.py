"""Token counts beside an index, and when they are refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from random_samples import RandomChunk
from toy_counts import ToyCount, toy_counts

from megavlm.data import token_counts
from megavlm.data.index import Index
from megavlm.data.index_build import build_index
from megavlm.data.sample import Sample
from megavlm.data.shards import write_shards
from megavlm.data.token_counts import add_token_counts
from megavlm.errors import DataError

CHUNK = RandomChunk(4, 50)
SAMPLES = [sample for sample in CHUNK if isinstance(sample, Sample)]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_shards([CHUNK], tmp_path / "out", target_bytes=50_000)
    return tmp_path / "out"


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_are_those_of_the_samples(dataset: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_counts, "_AT_ONCE", 15)
    seen: list[tuple[int, int]] = []
    report = add_token_counts(
        dataset, ToyCount(), "toy-1.0", "abc", workers=workers, on_progress=lambda *done: seen.append(done)
    )
    expected = [toy_counts(sample) for sample in SAMPLES]
    counts = Index.open(dataset).token_counts("toy-1.0", "abc")
    assert list(zip(counts.tokens, counts.targets, strict=True)) == expected
    assert (report.samples, report.tokens, report.targets) == (50, *map(sum, zip(*expected, strict=True)))
    assert report.damaged == [] and seen[-1][1] == 50
    about = json.loads((dataset / "index/tokens/toy-1.0/about.json").read_text())
    assert (about["tokens"], about["targets"]) == (report.tokens, report.targets)


@dataclass
class Interrupted:
    """Counts so many samples, then is interrupted."""

    left: int

    def __call__(self, sample: Sample) -> tuple[int, int]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return toy_counts(sample)


def test_killed_counting_goes_on(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_counts, "_AT_ONCE", 10)
    with pytest.raises(KeyboardInterrupt):
        add_token_counts(dataset, Interrupted(35), "toy", "abc")
    with pytest.raises(DataError, match="are not in the index"):
        Index.open(dataset).token_counts("toy", "abc")
    add_token_counts(dataset, Interrupted(20), "toy", "abc")
    counts = Index.open(dataset).token_counts("toy", "abc")
    assert list(zip(*counts, strict=True)) == [toy_counts(sample) for sample in SAMPLES]


def test_a_damaged_sample_counts_nothing(dataset: Path) -> None:
    path = dataset / "shard-00000.tar"
    data = bytearray(path.read_bytes())
    data[int(Index.open(dataset).rows([0]).words.offset[0])] ^= 1
    path.write_bytes(data)
    report = add_token_counts(dataset, ToyCount(), "toy", "abc")
    assert len(report.damaged) == 1 and "the checksum of its text differs" in report.damaged[0]
    counts = Index.open(dataset).token_counts("toy", "abc")
    expected = [toy_counts(sample) for sample in SAMPLES]
    assert list(zip(*counts, strict=True)) == [(0, 0), *expected[1:]]


def test_other_counts_are_refused(dataset: Path) -> None:
    add_token_counts(dataset, ToyCount(), "toy", "abc")
    index = Index.open(dataset)
    cases = [(("other", "abc"), "are not in the index"), (("toy", "xyz"), "another tokenizer or template: abc instead")]
    for arguments, problem in cases:
        with pytest.raises(DataError, match=problem) as caught:
            index.token_counts(*arguments)
        assert f"run `megavlm data index {dataset} --tokenizer" in caught.value.remedy
    with pytest.raises(DataError, match="is no name"):
        add_token_counts(dataset, ToyCount(), "../toy", "abc")
    kept = dataset / "index/tokens"
    kept.rename(dataset / "kept")
    write_shards([RandomChunk(7, 3)], dataset / "more")
    build_index(dataset)
    (dataset / "kept").rename(kept)
    with pytest.raises(DataError, match="made for other samples"):
        Index.open(dataset).token_counts("toy", "abc")
    (kept / "toy/about.json").write_text("7")
    with pytest.raises(DataError, match="are damaged"):
        Index.open(dataset).token_counts("toy", "abc")
