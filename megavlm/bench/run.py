"""All benchmarks of this machine: `make bench`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from megavlm.bench.adapter import adapter
from megavlm.bench.aquila_vl_step import aquila_vl_step
from megavlm.bench.data_path import data_path
from megavlm.bench.decoder_step import decoder_step
from megavlm.bench.harness import Comparison, DisagreementError, Row, measure
from megavlm.bench.plan_time import plan_time
from megavlm.bench.report import append, machine, table
from megavlm.bench.stalls import stalls

BENCHMARKS: dict[str, Callable[[bool], AbstractContextManager[Comparison | tuple[Comparison, ...]]]] = {
    "adapter": adapter,
    "decoder-step": decoder_step,
    "aquila-vl-step": aquila_vl_step,
    "data-path": data_path,
    "stalls": stalls,
    "plan-time": plan_time,
}
"""Name -> a function of `quick` (the same path at toy size) that sets the two sides up and clears them away."""

OF_CPU = ("adapter", "plan-time")
"""Left out where there is a GPU."""


def run(names: Sequence[str] = (), quick: bool = False, out: str | Path | None = None) -> int:
    """Measure the named benchmarks (none: all that this machine has), print the table, return the exit code."""
    rows: list[Row] = []
    problems: list[str] = []
    for name in names or _for_this_machine():
        try:
            with BENCHMARKS[name](quick) as found:
                for comparison in found if isinstance(found, tuple) else (found,):
                    rows.append(measure(comparison))
        except DisagreementError as error:
            problems.append(str(error))
    if rows:
        facts = machine()
        print(table(rows, facts))
        if out is not None:
            append(rows, facts, out)
    for problem in problems:
        print(f"no row: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _for_this_machine() -> list[str]:
    return [name for name in BENCHMARKS if name not in OF_CPU or not torch.cuda.is_available()]
