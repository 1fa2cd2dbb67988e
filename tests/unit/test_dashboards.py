"""TensorBoard and Weights & Biases, each read back by its own package."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from reports import groups_of_one, logging_run, report_of, start_of

from megavlm.build.log_config import LogConfig, check_installed
from megavlm.build.run_config import CheckpointConfig, RunConfig
from megavlm.errors import UnavailableError
from megavlm.train.callbacks import build_sinks
from megavlm.train.callbacks.metrics import Metrics, Sink
from megavlm.train.callbacks.weights_and_biases import ID_FILE
from megavlm.train.callbacks.window import LoggedSteps
from megavlm.train.report import RunStart


def train(run: RunConfig, first: int, last: int) -> None:
    """A start of a run, with an evaluation and a save at its end."""
    metrics = Metrics(run, groups_of_one(), build_sinks(run))
    metrics.start(start_of(run, first))
    for iteration in range(first, last + 1):
        rates = {"": 1e-3, "tower": 2e-6}
        metrics.after_step(report_of(iteration, learning_rates=rates))
    metrics.evaluated(last, {"lm loss": 1.5})
    metrics.saved(last, 7.0)
    metrics.end(last)


def test_tensorboard_holds_each_step_once_under_megatrons_names(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = logging_run(tensorboard_dir=str(tmp_path))
    train(run, 1, 5)
    train(run, 3, 4)
    found = EventAccumulator(str(tmp_path)).Reload()
    names = {"lm loss", "learning-rate", "learning-rate/tower", "grad-norm", "iteration-time", "throughput"}
    assert names | {"tokens-per-second", "waited-for-data", "lm loss validation"} <= set(found.Tags()["scalars"])
    assert "mfu" not in found.Tags()["scalars"]
    losses = [(event.step, event.value) for event in found.Scalars("lm loss")]
    assert losses == [(step, pytest.approx(5.0 / step)) for step in (1, 2, 3, 4)]
    assert [(event.step, event.value) for event in found.Scalars("save-blocked-ms")] == [(4, 7.0)]


def read_offline(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """(id, the numbers of each step) of an offline run, from the file that `wandb sync` sends."""
    from wandb.proto import wandb_internal_pb2 as proto

    (path,) = folder.glob("run-*.wandb")
    steps: list[dict[str, Any]] = []
    name = kind = ""
    deadline = time.monotonic() + 60
    while kind != "exit":  # the process that writes it may be a moment behind
        assert time.monotonic() < deadline, f"{path} is never finished"
        steps.clear()
        for data in leveldb_records(path.read_bytes()):
            record = proto.Record()
            record.ParseFromString(data)
            kind = str(record.WhichOneof("record_type"))
            if kind == "run":
                name = record.run.run_id
            if kind == "history":
                items = record.history.item
                steps.append({".".join(one.nested_key) or one.key: json.loads(one.value_json) for one in items})
    return name, steps


def leveldb_records(file: bytes) -> Iterator[bytes]:
    """W&B's files are LevelDB's logs behind a header of seven bytes: records in parts, in blocks of 32 KiB."""
    place, parts = 7, b""
    while place + 7 <= len(file):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
        _, length, kind = struct.unpack_from("<IHB", file, place)
        parts += file[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_a_run_that_goes_on_is_the_same_run_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = logging_run(wandb_project="toys", wandb_save_dir=str(tmp_path / "logs"))
    run = run.replace(checkpoint=CheckpointConfig(save_to=str(tmp_path / "saved")))
    train(run, 1, 2)
    train(run, 2, 3)
    found = [read_offline(folder) for folder in sorted((tmp_path / "logs" / "wandb").glob("offline-run-*"))]
    known = (tmp_path / "saved" / ID_FILE).read_text().strip()
    assert [name for name, _ in found] == [known, known]
    steps = {entry["_step"]: entry for _, entries in found for entry in entries}
    assert steps.keys() == {1, 2, 3}
    assert steps[3]["lm loss"] == pytest.approx(5 / 3)
    assert (steps[3]["lm loss validation"], steps[3]["save-blocked-ms"]) == (1.5, 7.0)
    train(run, 1, 1)
    assert (tmp_path / "saved" / ID_FILE).read_text().strip() != known


@pytest.mark.parametrize(
    ("settings", "package"), [({"tensorboard_dir": "x"}, "tensorboard"), ({"wandb_project": "x"}, "wandb")]
)
def test_a_package_that_is_missing_is_named_with_its_command(
    settings: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    option = "--" + next(iter(settings)).replace("_", "-")
    with pytest.raises(
        UnavailableError, match=rf"{option} = 'x': needs the package {package}, .* `pip install {package}`"
    ):
        check_installed(LogConfig(**settings))


class Failing(Sink):
    """A dashboard whose network is gone."""

    name = "the dashboard"

    def open(self, start: RunStart) -> None:
        self.calls = 0

    def steps(self, logged: LoggedSteps) -> None:
        self.calls += 1
        raise RuntimeError("no route to host")

    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None: ...
    def saved(self, iteration: int, blocked_ms: float) -> None: ...
    def close(self, iteration: int) -> None: ...


def test_a_dashboard_that_fails_is_given_up_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    sink, run = Failing(), logging_run()
    metrics = Metrics(run, groups_of_one(), [sink])
    metrics.start(start_of(run))
    for iteration in (1, 2):
        metrics.after_step(report_of(iteration))
    metrics.end(2)
    assert sink.calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        "the dashboard gets no more of this run: RuntimeError: no route to host"
    ]
