"""Garbage collection under a run's control, and the window of steps that is profiled."""

from __future__ import annotations

import gc
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reports import groups_of_one, logging_run, report_of, start_of

from megavlm import ranges
from megavlm.build.run_config import LogConfig
from megavlm.errors import ConfigError, UnavailableError
from megavlm.train.callbacks.garbage import GarbageCollection
from megavlm.train.callbacks.profiler import Profiler


@pytest.fixture(autouse=True)
def unchanged_collector() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was_on else gc.disable)()


def test_garbage_is_collected_behind_the_same_steps_and_else_never() -> None:
    run = logging_run(manual_gc=True, manual_gc_interval=3)
    callback = GarbageCollection(run)
    callback.start(start_of(run))
    collections = []
    gc.callbacks.append(lambda phase, _: collections.append((phase, iteration)))
    try:
        for iteration in range(1, 8):
            for _ in range(2000):  # enough to start the collector, were it on
                cycle: list[Any] = []
                cycle.append(cycle)
            callback.after_step(report_of(iteration))
    finally:
        gc.callbacks.pop()
    assert collections == [("start", 3), ("stop", 3), ("start", 6), ("stop", 6)]
    assert not gc.isenabled()
    callback.end(7)
    assert gc.isenabled()


def step(work: str) -> None:
    with ranges.named(work):
        torch.ones(8).sum()


def profiled(folder: Path, first: int, last: int, **changes: Any) -> dict[str, set[str]]:
    """Trace -> the names of our ranges in it, of a run over these steps."""
    settings = {"profile": True, "profile_step_start": 3, "profile_step_end": 5, "profile_dir": str(folder)}
    run = logging_run(**{**settings, **changes})
    callback = Profiler(run, groups_of_one())
    callback.start(start_of(run, first))
    for iteration in range(first, last + 1):
        callback.before_step(iteration)
        step(f"work {iteration}")
        callback.after_step(report_of(iteration))
    callback.end(last)
    return {path.name: names_in(path) for path in folder.glob("*")}


def names_in(trace: Path) -> set[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return {event["name"] for event in events if event.get("name", "").startswith("work")}


@pytest.mark.parametrize(
    ("first", "last", "steps"),
    [(1, 8, (3, 4)), (4, 8, (4, 4)), (1, 3, (3, 3))],
    ids=["whole", "gone on with in the window", "stopped in the window"],
)
def test_the_steps_of_the_window_are_in_the_trace(
    first: int, last: int, steps: tuple[int, int], tmp_path: Path
) -> None:
    begin, end = steps
    names = {f"work {number}" for number in range(begin, end + 1)}
    assert profiled(tmp_path, first, last) == {f"rank-00000-steps-{begin}-{end}.json.gz": names}


def test_other_ranks_and_other_steps_write_nothing(tmp_path: Path) -> None:
    assert profiled(tmp_path, 5, 9) == {}
    run = logging_run(profile=True, profile_ranks=(1,), profile_dir=str(tmp_path / "unmade"))
    with pytest.raises(UnavailableError, match=r"--profile-ranks = \[1\]: there are 1 ranks; use 0 to 0"):
        Profiler(run, groups_of_one()).start(start_of(run))
    assert not (tmp_path / "unmade").exists()


def test_ranges_are_named_where_somebody_looks() -> None:
    def seen() -> bool:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step("work")
        return any(event.key == "work" for event in profile.key_averages())

    assert not seen()
    run = logging_run(nvtx_ranges=True)
    callback = Profiler(run, groups_of_one())
    callback.start(start_of(run))
    assert seen()
    callback.end(1)
    assert not seen()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can be profiled by Nsight Systems")
def test_nsight_is_refused_where_there_is_no_gpu() -> None:
    run = logging_run(profile=True, use_pytorch_profiler=False)
    with pytest.raises(UnavailableError, match="--no-use-pytorch-profiler"):
        Profiler(run, groups_of_one()).start(start_of(run))


@pytest.mark.parametrize(
    "settings",
    [
        {"profile_step_start": 5, "profile_step_end": 5},
        {"profile_step_start": 0},
        {"profile_ranks": (-1,)},
        {"manual_gc_interval": -1},
        {"peak_tflops": 0.0},
        {"log_json": ""},
        {"wandb_exp_name": "name of nothing"},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"LogConfig\.({'|'.join(settings)}) = "):
        LogConfig(**settings)
