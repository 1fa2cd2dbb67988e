"""The log of JSON lines: what stands in it, and that it stays whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from full_disk import largest_file
from reports import groups_of_one, logging_run, report_of, start_of

from megavlm.errors import ConfigError
from megavlm.train.callbacks.json_lines import JsonLines, forget_from, read_log
from megavlm.train.callbacks.metrics import Metrics


def write_steps(path: Path, first: int, last: int, interval: int = 1) -> Metrics:
    """A start of a run, which saves every second step."""
    run = logging_run(log_interval=interval)
    metrics = Metrics(run, groups_of_one(), [JsonLines(path)])
    metrics.start(start_of(run, first))
    for iteration in range(first, last + 1):
        metrics.after_step(report_of(iteration))
        if iteration % 2 == 0:
            metrics.saved(iteration, 12.5)
    return metrics


def kinds(path: Path) -> list[tuple[str, int]]:
    return [(entry["kind"], entry["iteration"]) for entry in read_log(path)]


def test_steps_evaluations_and_saves_have_a_line_each(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.jsonl"
    metrics = write_steps(path, 1, 4, interval=2)
    metrics.evaluated(4, {"lm loss": math.inf})
    metrics.end(4)
    expected = [("start", 0), ("step", 2), ("save", 2), ("step", 4), ("save", 4), ("evaluation", 4), ("end", 4)]
    assert kinds(path) == expected
    _, step, save, _, _, evaluation, _ = read_log(path)
    assert step["losses"] == {"lm loss": 3.75}
    assert (step["consumed_samples"], step["learning_rate"], step["work"]["target_tokens"]) == (32, 1e-3, 1008)
    assert (step["throughput"]["waited"], step["throughput"]["mfu"], save["blocked_ms"]) == (0.25, None, 12.5)
    assert evaluation["losses"] == {"lm loss": None}


def test_a_run_that_goes_on_repeats_no_step(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write_steps(path, 1, 5)
    with path.open("ab") as file:
        file.write(b'{"kind": "step", "iterat')  # killed while it wrote
    write_steps(path, 3, 4).end(4)
    first = [("start", 0), ("step", 1), ("step", 2), ("save", 2)]
    assert kinds(path) == [*first, ("start", 2), ("step", 3), ("step", 4), ("save", 4), ("end", 4)]


def test_a_run_that_starts_afresh_puts_an_older_log_aside(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for last in (2, 3, 1):
        write_steps(path, 1, last)
    steps = {name: sum(kind == "step" for kind, _ in kinds(tmp_path / name)) for name in ("run.jsonl.1", "run.jsonl.2")}
    assert steps == {"run.jsonl.1": 2, "run.jsonl.2": 3}
    assert kinds(path) == [("start", 0), ("step", 1)]


@pytest.mark.parametrize("content", [b"weights", b"{}\n", b'{"iteration": "1"}\n', b"\x00" * 80, b'[{"iteration": 1}]'])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"model.bin, line 1 = .*: is no entry of a log of training"):
        forget_from(path, 1)
    assert path.read_bytes() == content


def test_a_full_disk_is_said_once_and_costs_whole_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.jsonl"
    metrics = write_steps(path, 1, 1)
    size = path.stat().st_size
    with largest_file(size + 100):
        for iteration in (2, 3):
            metrics.after_step(report_of(iteration))
    assert path.stat().st_size == size
    metrics.after_step(report_of(4))
    metrics.end(4)
    assert kinds(path)[-2:] == [("step", 4), ("end", 4)]
    first, second = (record.getMessage() for record in caplog.records)
    assert first == f"{path} cannot be written (File too large); training goes on without"
    assert second == f"{path} is written again; it lacks 2 lines"


def test_only_the_rank_that_speaks_writes(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run = logging_run()
    metrics = Metrics(run, groups_of_one(speaks=False), [JsonLines(path)])
    metrics.start(start_of(run))
    metrics.after_step(report_of(1))
    metrics.end(1)
    assert not path.exists()


def test_lines_are_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    metrics = write_steps(path, 1, 1)
    metrics.after_step(report_of(2, losses={"lm loss": math.nan}, grad_norm=math.inf))
    metrics.end(2)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    entries = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert (entries[-2]["losses"], entries[-2]["grad_norm"]) == ({"lm loss": None}, None)
