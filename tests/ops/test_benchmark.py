"""The benchmark without a GPU: its baselines compute the op, a red op is refused, and it says what it needs."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from python_source import ROOT

SCRIPT = ROOT / "kernels" / "benchmarks" / "run.py"


@pytest.fixture(scope="module")
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def small_works(run: ModuleType) -> list:
    """Without the variant that torch.compile builds, which takes a minute on a CPU."""
    gated = run.gated_work("small", 10, 32, "cpu")
    gated.variants.pop("best")
    return [
        run.resampler_work("small", 3, 7, 4, 2, 16, "cpu"),
        run.media_work("small", 2, 24, 3, 4, 2, 16, "cpu"),
        gated,
        run.tiles_work("small", 2, 2, 3, 4, 1, "cpu"),
        run.crops_work("small", 3, 17, 3, 4, "cpu"),
        run.assemble_work("small", 100, 2, 3, None, 8, "cpu"),
        run.assemble_work("small", 100, 3, 3, 5, 8, "cpu"),
    ]


def test_all_variants_compute_the_same(run: ModuleType) -> None:
    for work in small_works(run):
        grad_out = torch.randn_like(work.variants["plain"](*work.inputs), dtype=torch.float32)
        expected = run.values(work, "plain", torch.float32, grad_out)
        if "flex" in work.variants:  # which has no backward on a CPU
            flex = work.variants.pop("flex")(*(tensor.float() for tensor in work.inputs))
            torch.testing.assert_close(flex, expected[0])
        for variant in work.variants:
            for found, right in zip(run.values(work, variant, torch.float32, grad_out), expected, strict=True):
                torch.testing.assert_close(found, right)
        assert run.faults(work) == []


def test_a_red_op_is_refused(run: ModuleType) -> None:
    for work in small_works(run):
        right = work.variants["kernel"]
        red = dataclasses.replace(work, variants={**work.variants, "kernel": lambda *given, op=right: op(*given) * 1.1})
        first, *_ = run.faults(red)
        assert first.startswith(f"{work.op}, small") and "output is off by" in first and first.endswith("not timed")


def test_bytes_and_operations_follow_the_shape(run: ModuleType) -> None:
    resampler, media, gated, tiles, crops, copied, mixed = small_works(run)
    assert resampler.flops == 4 * 3 * 2 * 4 * (7 + 4) * 16
    assert media.flops == 4 * 2 * (24 - 8) * 4 * 2 * 16
    assert gated.bytes("forward") == 3 * 10 * 32 * 2 + 2
    assert gated.bytes("forward+backward") == 6 * 10 * 32 * 2 + 2
    assert tiles.passes == ("forward",) and tiles.bytes("forward") == 10 * 12 * 12 * 3 * 3
    assert crops.bytes("forward") == 3 * 12 * 12 * 3 * 3
    # Tokens of an image: 9 + 6 * 7 and 9 + 5 * 6; patch rows 45 and 90; the index 4 bytes a place.
    assert copied.bytes("forward") == (49 + 45 + 1 + 100) * 16 + 400
    assert mixed.bytes("forward+backward") == (61 + 90 + 1 + 100 + 200 + 90 + 1) * 16 + 3200


def test_a_row_holds_every_column(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def called_once(call: Callable[[], object]) -> tuple[float, float, float]:
        call()
        return 1.0, 2.0, 4.0

    monkeypatch.setattr(run, "milliseconds", called_once)
    resampler, *_ = small_works(run)
    forward, *_, backward = run.rows_of(resampler, (resampler.bytes("forward"), 1e9))
    assert ("date", "commit", "gpu", "torch", "triton", *forward) == run.COLUMNS
    assert (forward["passes"], forward["variant"]) == ("forward", "plain")
    assert (backward["passes"], backward["variant"]) == ("forward+backward", "kernel")
    assert (forward["ms_p50"], forward["share_of_roof"], forward["speedup_over_plain"]) == ("2.0000", "0.50", "1.00")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_it_needs() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 2
    assert done.stderr == "run.py times kernels on a CUDA GPU; this machine has none (resources.py needs none)\n"
