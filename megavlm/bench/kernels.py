"""The Triton kernels on a GPU: what `kernels/benchmarks/run.py` measures, against plain PyTorch and the best of it.

That script checks each op first, times no wrong one, and knows the real models' shapes and this GPU's roof.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from megavlm.bench.harness import Figure, Measurement, SkippedError
from megavlm.bench.processes import watched

SCRIPT = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks" / "run.py"
"""In a checkout; an installed package has none."""


@contextmanager
def kernels(quick: bool) -> Iterator[Measurement]:
    """The script as a process of its own."""
    if not torch.cuda.is_available():
        raise SkippedError("needs a GPU")
    if not SCRIPT.is_file():
        raise SkippedError("needs a checkout of the repository, which has the kernels' benchmark")
    yield Measurement("kernels", "milliseconds of each op at the real models' shapes, bf16, L2 cache flushed", _measure)


def _measure() -> Sequence[Figure]:
    with TemporaryDirectory() as place:
        results = Path(place) / "results.csv"
        watched([sys.executable, str(SCRIPT), "--out", str(results)])
        with results.open(newline="", encoding="utf-8") as file:
            return [figure_of(row) for row in csv.DictReader(file)]


def figure_of(row: Mapping[str, str]) -> Figure:
    """The times of one variant of an op; of the kernel also how it stands to plain PyTorch and to the GPU's roof."""
    name = f"{row['op']}, {row['shape']}, {row['passes']}: {row['variant']}"
    if row["variant"] == "kernel":
        name += f" ({row['speedup_over_plain']} times as fast as plain, {row['share_of_roof']} of the roof)"
    median, low, high = (float(row[column]) for column in ("ms_p50", "ms_p20", "ms_p80"))
    return Figure(name, "ms (p20 - p80)", median, low, high)
