"""All benchmarks of this machine: `make bench`, `megavlm bench`."""

from __future__ import annotations

import gc
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import date
from pathlib import Path

import torch

from megavlm.bench.adapter import adapter
from megavlm.bench.aquila_vl_step import aquila_vl_step
from megavlm.bench.checkpoint import checkpoint, checkpoint_1b, checkpoint_1b_trained
from megavlm.bench.data_path import data_path
from megavlm.bench.decoder_step import decoder_step
from megavlm.bench.harness import Comparison, Measurement, NoRowError, Row, SkippedError, measure
from megavlm.bench.kernels import kernels
from megavlm.bench.plan_time import plan_time
from megavlm.bench.planned_step import planned_step
from megavlm.bench.real_aquila_vl import real_aquila_vl
from megavlm.bench.real_infimm import real_infimm
from megavlm.bench.report import append, check_place, file_name, machine, table
from megavlm.bench.stalls import stalls
from megavlm.bench.start_up import start_up
from megavlm.config import nearest
from megavlm.errors import ConfigError

Found = Comparison | Measurement | tuple[Comparison | Measurement, ...]
Benchmark = Callable[[bool], AbstractContextManager[Found]]

BENCHMARKS: dict[str, Benchmark] = {
    "adapter": adapter,
    "decoder-step": decoder_step,
    "aquila-vl-step": aquila_vl_step,
    "data-path": data_path,
    "stalls": stalls,
    "start-up": start_up,
    "checkpoint": checkpoint,
    "checkpoint-1b": checkpoint_1b,
    "checkpoint-1b-trained": checkpoint_1b_trained,
    "plan": plan_time,
    "planned-step": planned_step,
    "kernels": kernels,
    "aquila-vl-2b": real_aquila_vl,
    "infimm-7b": real_infimm,
}
"""Name -> a function of `quick` (the same path at toy size) that sets up what is measured and clears it away; a
SkippedError says what this machine lacks."""
ON_REQUEST = ("checkpoint-1b", "checkpoint-1b-trained")
"""Those that run only when they are named: they need more memory or time than a look at a machine should."""


def run(
    names: Sequence[str] = (), quick: bool = False, out: str | Path | None = None, folder: Path | None = None
) -> int:
    """Measure the named benchmarks (none: all but those ON_REQUEST), print the tables, return the exit code.

    Rows are appended to `out`, or without it to the file of this machine and day in `folder`.
    """
    for name in names:
        _check_name(name)
    if out is not None:
        check_place(out)
    rows: list[Row] = []
    problems: list[str] = []
    # As Ctrl-C is: a time limit's signal runs what follows, too.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        for name in names or [name for name in BENCHMARKS if name not in ON_REQUEST]:
            _measure(name, quick, rows, problems)
    finally:  # whatever ends it, what was measured is not lost
        signal.signal(signal.SIGTERM, before)
        if rows:
            facts = machine()
            print(table(rows, facts), flush=True)
            if out is None and folder is not None:
                out = folder / file_name(facts, date.today())
            if out is not None:
                append(rows, facts, out)
                print(f"\nthe rows are in {out}", flush=True)
    for problem in problems:
        print(f"no row: {problem}", file=sys.stderr)
    return 1 if problems else 0


def listing() -> str:
    """One line for each benchmark: its module's first, or of a larger variant its own."""
    width = max(map(len, BENCHMARKS))
    lines = []
    for name, benchmark in BENCHMARKS.items():
        is_variant = name in ON_REQUEST
        about = benchmark.__doc__ if is_variant else sys.modules[benchmark.__module__].__doc__
        lines.append(f"{name:<{width}}  {(about or '').splitlines()[0]}{' Only when named.' if is_variant else ''}")
    return "\n".join(lines)


def _check_name(name: str) -> None:
    if name in BENCHMARKS:
        return
    close = nearest(name, BENCHMARKS)
    remedy = f"did you mean {close}?" if close else f"use one of {', '.join(BENCHMARKS)}"
    raise ConfigError("--only", name, "no such benchmark", f"{remedy} (`megavlm bench --list` lists them)")


def _measure(name: str, quick: bool, rows: list[Row], problems: list[str]) -> None:
    """Add the rows of a benchmark, or why it has none: one that fails must not cost the others theirs."""
    print(f"measuring {name}", file=sys.stderr, flush=True)
    try:
        with BENCHMARKS[name](quick) as found:
            for one in found if isinstance(found, tuple) else (found,):
                rows.append(measure(one))
    except SkippedError as reason:
        print(f"{name}: skipped: {reason}", flush=True)
    except NoRowError as error:
        problems.append(str(error))
    except Exception as error:
        traceback.print_exc()
        problems.append(f"{name}: {type(error).__name__}: {error}")
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the next one may be a process of its own, which needs the memory
