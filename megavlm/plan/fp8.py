"""Runs in FP8 in a plan: refused where the trainer refuses them, timed at the chip's FP8 peak where it has one."""

from __future__ import annotations

from typing import Any

from megavlm.build.run_config import RunConfig
from megavlm.errors import ConfigError
from megavlm.model.precision import check_fp8
from megavlm.parallel.recompute import check_recompute
from megavlm.plan.cluster import Chip
from megavlm.plan.cost import Efficiency


def fp8_products(run: RunConfig, chip: Chip, efficiency: Efficiency) -> float | None:
    """Floating-point operations a second that products in FP8 reach; none of a run without them.

    Refuses what the trainer would on that chip, with Transformer Engine installed unless the run wants none of it.
    """
    if run.precision.fp8_format == "none":
        return None
    major, minor = _given("Chip.capability", chip.capability, "what its maker says, for example [9, 0]")
    has_engine = run.transformer_impl != "local"
    check_fp8(run.precision, chip.name, (major, minor), has_engine)
    check_recompute(run.recompute, run.precision, on_gpu=True, has_engine=has_engine)
    peak = _given("Chip.fp8_tflops", chip.fp8_tflops, "what its data sheet says")
    share = _given("Efficiency.fp8", efficiency.fp8, "the share of the FP8 peak that products reach, for example 0.6")
    return 1e12 * float(peak) * float(share)


def _given(where: str, value: Any, remedy: str) -> Any:
    if value is None:
        raise ConfigError(where, value, "is not given, and the run is in FP8", f"write {remedy}")
    return value


def fp8_assumptions(run: RunConfig, efficiency: Efficiency) -> list[str]:
    """What a plan of a run in FP8 takes for granted."""
    if run.precision.fp8_format == "none":
        return []
    return [
        f"FP8: products of the decoder's layers and gated blocks reach {efficiency.fp8:.0%} of the FP8 peak "
        f"({efficiency.sources.get('fp8', 'assumed')}); tower, connector, head and attention stay in bf16, and so does "
        "all memory and the peak that MFU is a share of",
        "FP8, not modelled: casts, scales and their exchange, FP8 copies of weights, activations kept in FP8, shapes "
        "that Transformer Engine does not take",
    ]
