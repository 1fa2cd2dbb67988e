"""Rows of benchmarks as aligned tables, and as JSON beside the machine they were measured on."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megavlm.bench.harness import THREADS, Row
from megavlm.errors import ConfigError

_TIMES = ("benchmark", "side", "min ms", "median ms", "p80 ms", "ratio", "p20 - p80", "target")
_FIGURES = ("benchmark", "figure", "median", "min - max", "unit", "target")
_TEXT_COLUMNS = 2


def machine() -> dict[str, str | int]:
    """What a row depends on beside the code, and the code's commit; nothing that names this one machine."""
    facts: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": THREADS,
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
        "transformers": version("transformers"),
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    """The short commit, with a plus where files differ from it; unknown outside a checkout."""
    here = Path(__file__).resolve().parent
    git = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    done = subprocess.run(git, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def table(rows: Sequence[Row], facts: dict[str, str | int]) -> str:
    """The machine and what each benchmark computes; the times, ours with the ratio, then theirs; then the figures."""
    about = ["  ".join(f"{name}: {value}" for name, value in facts.items())]
    about += [f"{row.benchmark}: {row.case}" + (f"; {row.rounds} rounds" if row.rounds else "") for row in rows]
    times = [line for row in rows for line in _times_of(row)]
    figures = [line for row in rows for line in _figures_of(row)]
    tables = [_aligned([header, *lines]) for header, lines in ((_TIMES, times), (_FIGURES, figures)) if lines]
    return "\n\n".join(["\n".join(about), *tables])


def _times_of(row: Row) -> Iterator[Sequence[str]]:
    for index, (side, times) in enumerate(row.times.items()):
        measured = (f"{times.min:.2f}", f"{times.median:.2f}", f"{times.p80:.2f}")
        ratio = ("", "", "")
        if index == 0 and row.ratio is not None:
            spread = f"{row.ratio.p20:.3f} - {row.ratio.p80:.3f}"
            ratio = (f"{row.ratio.median:.3f}", spread, "" if row.target is None else f"<= {row.target:.2f}")
        yield (row.benchmark if index == 0 else "", side, *measured, *ratio)


def _figures_of(row: Row) -> Iterator[Sequence[str]]:
    for index, one in enumerate(row.figures):
        target = "" if one.target is None else f"<= {one.target:g}"
        spread = f"{one.min:.2f} - {one.max:.2f}"
        yield (row.benchmark if index == 0 else "", one.name, f"{one.median:.2f}", spread, one.unit, target)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < _TEXT_COLUMNS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def check_place(path: str | Path) -> None:
    """Refuse a file that `append` could not add to, before minutes are spent on what it is to hold."""
    path = Path(path)
    if not path.parent.is_dir():
        raise ConfigError("--out", str(path), f"there is no folder {path.parent}", "make it, or name another file")
    try:
        known = _known(path)
    except (ValueError, OSError):
        known = None
    if not isinstance(known, list):
        raise ConfigError("--out", str(path), "is there and cannot be read as a list of rows", "name another file")


def kept_place() -> Path | None:
    """The folder that keeps the rows of a checkout; an installed package has none."""
    root = Path(__file__).resolve().parents[2]
    folder = root / "docs" / "benchmarks"
    return folder if (root / ".git").exists() and folder.is_dir() else None


def file_name(facts: dict[str, str | int], today: date) -> str:
    """By machine, its GPU where it has one, and by date: `amd-epyc-2026-05-31.json`."""
    words = re.findall(r"[a-z0-9]+", str(facts.get("gpu") or facts["cpu"]).lower())
    return f"{'-'.join([*words, today.isoformat()])}.json"


def append(rows: Sequence[Row], facts: dict[str, str | int], path: str | Path) -> None:
    """Add the rows to the JSON list in that file, which need not exist yet."""
    path = Path(path)
    text = json.dumps([*_known(path), *(_as_json(row, facts) for row in rows)], indent=2) + "\n"
    path.write_text(text, encoding="utf-8")


def _known(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _as_json(row: Row, facts: dict[str, str | int]) -> dict[str, Any]:
    """What the row has, floats cut to what a clock can tell; figures by their names, each with its unit."""
    content = asdict(row)
    content["figures"] = {
        one.pop("name"): {key: value for key, value in one.items() if value is not None} for one in content["figures"]
    }
    unit = {"unit": "ms"} if row.times else {}
    cut = json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 3))
    return {**unit, **{key: value for key, value in cut.items() if value not in (None, {})}, "machine": facts}
