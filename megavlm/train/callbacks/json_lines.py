"""A file of JSON lines, one for each logged step, evaluation and save: for programs, and for looking back."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from megavlm.data.files import AT_ONCE, append_whole, lines_from_end, numbered_line, open_to_append, where_to_cut
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

    Steps rise in a log, so what is to be forgotten is its end, and only that is read. A run that starts afresh puts an
    older log aside.
    """
    if not path.exists():
        return
    if iteration == 1 and _last_iteration(path) >= 1:
        aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.{n}")).exists())
        path.rename(aside)
        logger.info("the log of an earlier start is now %s", aside)
    else:
        os.truncate(path, where_to_cut(path, partial(_iteration, path), iteration))


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """All entries of a log; a last line that a killed run broke off in is passed over."""
    path, found, begin = Path(path), [], 0
    with path.open("rb") as file:
        for line in file:
            found.append(_entry(path, begin, line))
            begin += len(line)
    return [entry for entry in found if entry is not None]


def _last_iteration(path: Path) -> int:
    with path.open("rb") as file:
        numbers = (_iteration(path, begin, line) for begin, line in lines_from_end(file))
        return next((number for number in numbers if number is not None), 0)


def _iteration(path: Path, begin: int, line: bytes) -> int | None:
    entry = _entry(path, begin, line)
    return None if entry is None else int(entry["iteration"])


def _entry(path: Path, begin: int, line: bytes) -> dict[str, Any] | None:
    """What the line says that begins there in the file; None where a killed run broke off in it."""
    is_whole = line.endswith(b"\n")
    if not is_whole and line.startswith(_BEGIN[: len(line)]):
        return None
    entry = numbered_line(line, "iteration")
    if entry is None or not is_whole:
        where = f"{path}, line {_ends_of_lines(path, begin) + 1}"
        problem = "is no entry of a log of training"
        raise ConfigError(where, line[:40].decode(errors="replace"), problem, "give the name of another file")
    return entry


def _ends_of_lines(path: Path, size: int) -> int:
    """How many there are in the first bytes of a file."""
    found = 0
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(size, AT_ONCE))):
            found, size = found + chunk.count(b"\n"), size - len(chunk)
    return found


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return value
