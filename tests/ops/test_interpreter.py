"""Runs the kernel tests on this machine's CPU: in processes whose Triton was imported with TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from python_source import ROOT

FOLDER = Path(__file__).parent / "kernels"
SOURCES = sorted((ROOT / "kernels" / "megavlm_kernels").rglob("*.py"))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process runs them itself")
@pytest.mark.parametrize("file", sorted(FOLDER.glob("test_*.py")), ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--color=no", "-p", "no:cacheprovider", str(file)]
    interpreted = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=ROOT, env=interpreted, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and re.search(r"\[100%\]", done.stdout), done.stdout[-8000:] + done.stderr[-2000:]


def test_no_kernel_adds_in_an_order_left_to_chance() -> None:
    assert SOURCES
    assert [path.name for path in SOURCES if "tl.atomic" in path.read_text(encoding="utf-8")] == []
