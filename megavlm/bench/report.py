"""Rows of benchmarks as one aligned table, and as JSON beside the machine they were measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from megavlm.bench.harness import THREADS, Row

_HEADER = ("benchmark", "side", "min ms", "median ms", "p80 ms", "ratio", "p20 - p80", "target")
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
    """The machine, what each benchmark computes, and two lines a benchmark: ours with the ratio, then theirs."""
    lines = [_HEADER]
    for row in rows:
        ratio = (f"{row.ratio.median:.3f}", f"{row.ratio.p20:.3f} - {row.ratio.p80:.3f}", f"<= {row.target:.2f}")
        for index, (side, times) in enumerate(row.times.items()):
            measured = (f"{times.min:.2f}", f"{times.median:.2f}", f"{times.p80:.2f}")
            lines.append((row.benchmark, side, *measured, *ratio) if index == 0 else ("", side, *measured, "", "", ""))
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    about = ["  ".join(f"{name}: {value}" for name, value in facts.items())]
    about += [f"{row.benchmark}: {row.case}; {row.rounds} rounds" for row in rows]
    return "\n".join([*about, "", *(_aligned(line, widths) for line in lines)])


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = zip(line, widths, strict=True)
    text = (c.ljust(w) if column < _TEXT_COLUMNS else c.rjust(w) for column, (c, w) in enumerate(cells))
    return "  ".join(text).rstrip()


def append(rows: Sequence[Row], facts: dict[str, str | int], path: str | Path) -> None:
    """Add the rows to the JSON list in that file, which need not exist yet."""
    path = Path(path)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    found = [{"unit": "ms", **_rounded(asdict(row)), "machine": facts} for row in rows]
    path.write_text(json.dumps([*known, *found], indent=2) + "\n", encoding="utf-8")


def _rounded(value: object) -> dict:
    """The same with floats cut to what a clock can tell."""
    cut = json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 3))
    assert isinstance(cut, dict)
    return cut
