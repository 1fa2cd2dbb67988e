"""The order of samples: what makes a step, that nothing is lost or read twice, and parts that share no sample."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from megavlm.data.order import SourceConfig, StepOrder, StepSamples, StreamConfig
from megavlm.errors import ConfigError, DataError, MegavlmError

SIZES = {"photos": 1_031, "charts": 97, "text": 1_500, "tiny": 1}


def stream(samples_per_step: int = 64, name: str = "data", **amounts: dict[str, Any]) -> StreamConfig:
    """A stream of these sources: `photos={"epochs": 1}`."""
    sources = tuple(SourceConfig(name=source, **fields) for source, fields in amounts.items())
    return StreamConfig(name=name, samples_per_step=samples_per_step, sources=sources)


def rows(samples: StepSamples) -> list[tuple[int, ...]]:
    columns = (samples.stream, samples.place, samples.source, samples.index, samples.epoch)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def whole(order: StepOrder) -> list[tuple[int, ...]]:
    assert order.steps is not None
    return [row for step in range(order.steps) for row in rows(order.step(step))]


WEIGHTED = stream(photos={"weight": 0.5}, charts={"weight": 0.2}, text={"weight": 0.3})
FINITE = stream(photos={"epochs": 1}, charts={"epochs": 2.5}, text={"epochs": 0.75}, tiny={"epochs": 3})


@pytest.mark.parametrize("config", [WEIGHTED, FINITE])
def test_a_step_is_its_stretch_of_the_stream(config: StreamConfig) -> None:
    """Any step alone, from an order made anew, is what the stream holds there."""
    order = StepOrder([config], SIZES, seed=3)
    steps = 30 if order.steps is None else order.steps
    in_turn = [rows(order.step(step)) for step in range(steps)]
    total = sum(map(len, in_turn))
    once = order.streams[0].samples(0, total)
    assert [row[2:] for step in in_turn for row in step] == list(
        zip(once.source.tolist(), once.index.tolist(), once.epoch.tolist(), strict=True)
    )
    assert [row[1] for step in in_turn for row in step] == list(range(total))
    for step in np.random.default_rng(0).permutation(steps)[:8].tolist():
        assert rows(StepOrder([config], SIZES, seed=3).step(step)) == in_turn[step]


def test_every_sample_once_a_pass() -> None:
    seen = whole(StepOrder([FINITE], SIZES, seed=11))
    for number, (name, epochs) in enumerate([("photos", 1), ("charts", 2.5), ("text", 0.75), ("tiny", 3)]):
        mine = [(epoch, index) for _, _, source, index, epoch in seen if source == number]
        size = SIZES[name]
        assert len(mine) == int(epochs * size + 0.5)
        assert len(set(mine)) == len(mine), "a sample twice in a pass"
        for epoch in range(int(epochs)):
            assert {index for of, index in mine if of == epoch} == set(range(size))


def test_sample_counts_are_exact_however_many_passes_they_take() -> None:
    seen = whole(StepOrder([stream(100, photos={"samples": 10}, charts={"samples": 1_000})], SIZES, seed=0))
    assert np.bincount([row[2] for row in seen]).tolist() == [10, 1_000]
    counts = np.bincount([row[3] for row in seen if row[2] == 1], minlength=97)
    assert set(counts) <= {10, 11} and counts.sum() == 1_000


def test_passes_and_seeds_differ() -> None:
    config = stream(1_031, photos={"epochs": 2})
    first, second = (StepOrder([config], SIZES, 1).step(step).index for step in (0, 1))
    other = StepOrder([config], SIZES, 2).step(0).index
    for one, two in ((first, second), (first, other)):
        assert (one == two).sum() < 10


@pytest.mark.parametrize("limit", [None, 1_000])
def test_parts_share_no_sample_and_leave_none_out(limit: int | None) -> None:
    """Also when the stages that train on them have seeds and amounts of their own."""
    found = []
    for part in range(3):
        fields: dict[str, Any] = {"part": part, "parts": 3, "limit": limit}
        twice = stream(256, photos={**fields, "epochs": 2})
        (passes,) = {
            frozenset(np.unique([row[3] for row in whole(StepOrder([twice], SIZES, seed))])) for seed in (0, 5)
        }
        found.append(passes)
    assert sum(map(len, found)) == len(frozenset().union(*found)) == (limit or 1_031)
    assert max(map(len, found)) - min(map(len, found)) <= 1
    thirds = [sorted(part)[len(part) // 2] for part in found]
    assert max(thirds) - min(thirds) < 200, "parts are not random"


def test_streams_have_their_own_shares() -> None:
    """InfiMM's pretraining: pairs and documents."""
    sizes = {"laion": 115_000_000, "coyo": 238_000_000, "obelics": 101_000_000, "mmc4": 53_000_000}
    pairs = stream(3_938, "pairs", laion={"epochs": 1}, coyo={"epochs": 1})
    documents = stream(1_182, "documents", obelics={"weight": 101}, mmc4={"weight": 53})
    order = StepOrder([pairs, documents], sizes, seed=0)
    assert order.samples_per_step == 5_120 and order.steps == -(-353_000_000 // 3_938)
    step = order.step(70_000)
    assert np.bincount(step.stream).tolist() == [3_938, 1_182]
    assert step.place[0] == 70_000 * 3_938 and step.place[3_938] == 70_000 * 1_182
    assert np.bincount(step.source) == pytest.approx(
        3_938 * np.array([115, 238, 0, 0]) / 353 + 1_182 * np.array([0, 0, 101, 53]) / 154, abs=2
    )
    assert [order.sources[number].name for number in np.unique(step.source)] == list(sizes)
    assert len(order.step(order.steps - 1).index) == 353_000_000 % 3_938 + 1_182


def test_no_memory_grows_with_the_data() -> None:
    sources = {f"source{number}": {"epochs": 1.0 + number / 7} for number in range(30)}
    sizes = dict.fromkeys(sources, 700_000_000 // 30 + 1)
    tracemalloc.start()
    order = StepOrder([stream(512, "data", **sources)], sizes, seed=0)
    assert order.steps is not None
    for step in (0, order.steps // 3, order.steps - 1):
        order.step(step)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: stream(photos={"weight": 1}, text={"epochs": 1}), ConfigError, "says weight, epochs of its data sets"),
        (lambda: stream(photos={}), ConfigError, "says nothing"),
        (lambda: stream(photos={"weight": 1, "samples": 2}), ConfigError, "weight and samples"),
        (lambda: stream(photos={"weight": 0}), ConfigError, "is not above 0"),
        (lambda: stream(photos={"epochs": 1, "part": 3, "parts": 3}), ConfigError, "is not among 3 parts"),
        (lambda: StepOrder([stream(tiny={"epochs": 1, "parts": 2})], SIZES, 0), ConfigError, "leave a part empty"),
        (lambda: StepOrder([stream(tiny={"epochs": 0.2})], SIZES, 0), ConfigError, "too few epochs"),
        (lambda: StepOrder([stream(songs={"epochs": 1})], SIZES, 0), ConfigError, "use one that is: photos, charts"),
        (lambda: StepOrder([FINITE, stream(photos={"weight": 1})], SIZES, 0), ConfigError, "is in two streams"),
        (lambda: StepOrder([stream(photos={"weight": 1e-13}, text={"weight": 1})], SIZES, 0), ConfigError, "too small"),
        (lambda: StepOrder([stream(photos={"samples": 2 << 40})], SIZES, 0), ConfigError, "more than a trillion"),
        (lambda: StepOrder([FINITE], SIZES, 0).step(40), DataError, "is no step of the 38 that the data have"),
        (lambda: StepOrder([WEIGHTED], SIZES, 0).step(-1), DataError, "step"),
    ],
)  # fmt: skip
def test_mistakes_are_named(make: Any, error: type[MegavlmError], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
