"""What real runs leave behind: a log that goes on where the run goes on, and profiles with the parts of a step."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from resumed_runs import PP2, aquila_folder, run_of, start

from megavlm import ranges
from megavlm.build.run_config import CheckpointConfig, LogConfig, ParallelConfig, RunConfig
from megavlm.parallel import groups as process_groups
from megavlm.recipes import recipe
from megavlm.testing import spawn
from megavlm.train.callbacks.json_lines import read_log
from megavlm.train.loop import train


def run_with(folder: str, degrees: dict[str, Any], **train: Any) -> RunConfig:
    run, place = recipe("decoder-tiny"), Path(folder)
    batch = {"global_batch_size": 4, "micro_batch_size": 1, "seq_length": 16, "log_interval": 1}
    return run.replace(
        parallel=ParallelConfig(**degrees),
        train=run.train.replace(**{**batch, **train}),
        checkpoint=CheckpointConfig(save_to=str(place / "saved"), save_interval=2),
        log=LogConfig(
            log_json=str(place / "log.jsonl"),
            profile=True,
            profile_step_start=2,
            profile_step_end=4,
            profile_ranks=(0, 1),
            manual_gc=True,
            manual_gc_interval=2,
        ),
    )


def train_twice(folder: str, degrees: dict[str, Any]) -> None:
    """A run that is stopped behind step 3, and the same once more."""
    process_groups.join()
    for changes in ({"exit_interval": 3}, {}):
        run = run_with(folder, degrees, train_iters=5, **changes)
        train(run, process_groups.start(run.parallel, run.train.seed))
        process_groups.stop()


@pytest.mark.parametrize("degrees", [{}, PP2], ids=["DP=2", "PP=2"])
def test_a_run_logs_each_step_once_and_profiles_its_window(degrees: dict[str, Any], tmp_path: Path) -> None:
    spawn(train_twice, 2, str(tmp_path), degrees)
    entries = read_log(tmp_path / "log.jsonl")
    steps = [entry for entry in entries if entry["kind"] == "step"]
    assert [entry["iteration"] for entry in steps] == [1, 2, 3, 4, 5]
    assert [entry["iteration"] for entry in entries if entry["kind"] == "start"] == [0, 3]
    saves = {entry["iteration"]: entry["blocked_ms"] for entry in entries if entry["kind"] == "save"}
    assert saves.keys() == {2, 3, 4, 5} and min(saves.values()) > 0
    for entry in steps:
        assert entry["losses"]["lm loss"] > 0
        assert 0 <= entry["throughput"]["waited"] < 1
        assert entry["throughput"]["tokens_per_second"] > 0
        assert entry["work"]["tokens"] == entry["work"]["target_tokens"] + 4
    traces = sorted((tmp_path / "saved" / "profile").iterdir())
    assert [path.name for path in traces] == [f"rank-{rank:05d}-steps-2-3.json.gz" for rank in (0, 1)]
    for path in traces:
        names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
        assert {"data", "forward-backward", "gradient norm", "optimizer"} <= names


def names_of_a_step(weights: str) -> list[str]:
    process_groups.join()
    live = start(run_of("aquila_vl, stage 1", Path(weights), {}))
    ranges.switch_on()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        live.step(0)
    return [event.key for event in profile.key_averages()]


def test_the_tower_has_a_name(tmp_path: Path) -> None:
    (names,) = spawn(names_of_a_step, 1, str(aquila_folder(tmp_path)))
    assert {"tower", "forward-backward", "optimizer"} <= set(names)
