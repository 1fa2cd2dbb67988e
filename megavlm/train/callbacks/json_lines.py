"""A file of JSON lines, one for each logged step, evaluation and save: for programs, and for looking back."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megavlm.data.files import append_whole, open_to_append
from megavlm.errors import ConfigError
from megavlm.log import get_logger
from megavlm.train.callbacks.metrics import Sink
from megavlm.train.callbacks.window import LoggedSteps
from megavlm.train.report import RunStart

logger = get_logger(__name__)

_BEGIN = b'{"kind": "'
"""Of every line."""


class JsonLines(Sink):
    """Whole lines alone reach the file; a disk that is full costs lines, and not the run."""

    name = "the log of --log-json"

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file: int | None = None
        self._lost = 0

    def open(self, start: RunStart) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        forget_from(self._path, start.first_iteration)
        self._file = open_to_append(self._path)
        self._write("start", start.first_iteration - 1, {"name": start.run.name, "processes": start.groups.world_size})

    def steps(self, logged: LoggedSteps) -> None:
        report = logged.last
        rates = dict(report.learning_rates)
        self._write(
            "step",
            report.iteration,
            {
                "train_iters": report.train_iters,
                "consumed_samples": report.consumed_samples,
                "losses": logged.losses,
                "learning_rate": rates.pop(""),
                "learning_rates": rates,
                "grad_norm": report.grad_norm,
                "applied": report.applied,
                "skipped": report.skipped,
                "nan": report.nan,
                "throughput": asdict(logged.throughput),
                "work": asdict(report.work),
            },
        )

    def evaluated(self, iteration: int, losses: Mapping[str, float]) -> None:
        self._write("evaluation", iteration, {"losses": losses})

    def saved(self, iteration: int, blocked_ms: float) -> None:
        self._write("save", iteration, {"blocked_ms": blocked_ms})

    def close(self, iteration: int) -> None:
        if self._file is not None:
            self._write("end", iteration, {})
            os.close(self._file)
            self._file = None

    def _write(self, kind: str, iteration: int, fields: Mapping[str, Any]) -> None:
        assert self._file is not None
        entry = _finite({"kind": kind, "iteration": iteration, "time": time.time(), **fields})
        try:
            append_whole(self._file, json.dumps(entry, allow_nan=False).encode() + b"\n")
        except OSError as error:
            if self._lost == 0:
                logger.warning("%s cannot be written (%s); training goes on without", self._path, error.strerror)
            self._lost += 1
            return
        if self._lost:
            logger.warning("%s is written again; it lacks %d lines", self._path, self._lost)
            self._lost = 0


def forget_from(path: Path, iteration: int) -> None:
    """Cut a log before this step, as a run goes on that had gone further before it was stopped.

    Steps rise in a log, so what is to be forgotten is its end. A run that starts afresh puts an older log aside.
    """
    if not path.exists():
        return
    keep = 0
    for end, entry in _entries(path):
        if entry["iteration"] >= iteration:
            break
        keep = end
    else:
        end = keep
    if iteration == 1 and end > keep:
        aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.{n}")).exists())
        path.rename(aside)
        logger.info("the log of an earlier start is now %s", aside)
    else:
        os.truncate(path, keep)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """All entries of a log; a last line that a killed run broke off in is passed over."""
    return [entry for _, entry in _entries(Path(path))]


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(where it ends in the file, an entry)."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            is_whole = line.endswith(b"\n")
            if not is_whole and line.startswith(_BEGIN[: len(line)]):
                return
            entry = _parsed(line)
            if entry is None or not is_whole:
                problem = "is no entry of a log of training"
                where = f"{path}, line {number}"
                raise ConfigError(where, line[:40].decode(errors="replace"), problem, "give the name of another file")
            end += len(line)
            yield end, entry


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("iteration"), int) else None


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return value
