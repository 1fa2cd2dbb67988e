"""Real compilation for sm_80 and sm_90: no spills, shared memory within the chip, nothing worse than the table."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import ModuleType

import pytest
from python_source import ROOT

SCRIPT = ROOT / "kernels" / "benchmarks" / "resources.py"


@pytest.fixture(scope="module")
def resources() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_resources", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernels_compile_as_the_table_says() -> None:
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--check"]
    done = subprocess.run(command, env=compiling, capture_output=True, text=True, timeout=300, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr


def test_the_table_covers_every_op_and_chip(resources: ModuleType) -> None:
    rows = resources.read_table()
    ops = ("resampler_attention", "media_attention", "gated_residual", "tile_pack", "sequence_assemble")
    assert {(row["op"], row["chip"]) for row in rows} == {(op, chip) for op in ops for chip in resources.CHIPS}
    assert {row["width"] for row in rows} == {"64", "88", "96", "588", "1152", "1536", "4096", "5120"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"registers": "90"}, None),
        ({"registers": "101"}, "op kernel sm_80 64: registers 101, in resources.csv 100; run resources.py --update"),
        ({"shared_bytes": "2049"}, "op kernel sm_80 64: shared_bytes 2049, in resources.csv 2048"),
        ({"shared_bytes": "163841"}, "op kernel sm_80 64: 163841 bytes of shared memory, at most 163840"),
        ({"spill_bytes": "8"}, "op kernel sm_80 64: spills 8 bytes; use smaller blocks"),
        ({"blocks": "128x64"}, "op kernel sm_80 64: blocks 128x64, in resources.csv 64x64"),
        ({"width": "72"}, "op kernel sm_80 72: not in resources.csv"),
        ({"triton": "9.9", "registers": "101"}, None),
        ({"triton": "9.9", "spill_bytes": "8"}, "op kernel sm_80 64: spills 8 bytes"),
    ],
)
def test_what_is_worse_is_named(resources: ModuleType, change: dict[str, str], complaint: str | None) -> None:
    values = ("op", "kernel", "sm_80", "64", "64x64", "4", "2", "100", "0", "2048", "3.6.0")
    row = dict(zip(resources.COLUMNS, values, strict=True))
    lines = resources.complaints([{**row, **change}], [row])
    assert lines[0].startswith(complaint) if complaint else not lines, lines


def test_a_row_without_a_kernel_is_named(resources: ModuleType) -> None:
    row = dict.fromkeys(resources.COLUMNS, "1")
    assert resources.complaints([], [row]) == ["1 1 1 1: in resources.csv only; run resources.py --update"]
