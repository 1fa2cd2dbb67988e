"""The time of work on a chip, and the file that says what kernels reach of it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from megavlm.build.run_config import RunConfig
from megavlm.errors import ConfigError, UnavailableError
from megavlm.model.precision import check_fp8
from megavlm.parallel.recompute import RecomputeConfig, check_recompute
from megavlm.plan.cluster import BOARDS, parse_cluster
from megavlm.plan.cost import CALIBRATION, Calibration, Efficiency, seconds_of
from megavlm.plan.fp8 import fp8_assumptions
from megavlm.plan.in_flight import ChunkMemory, peak_bytes
from megavlm.plan.judge import rate_of
from megavlm.plan.pipeline_program import Shape, in_flight
from megavlm.plan.profile import OpCost
from megavlm.recipes import recipe


def cost(**fields: Any) -> OpCost:
    return OpCost(**{"part": "decoder", "kind": "matmul", "phase": "forward", **fields})


def test_every_known_chip_is_calibrated_and_every_number_has_its_source() -> None:
    calibration = Calibration.load(CALIBRATION)
    assert set(calibration.chips) == set(BOARDS)
    for name, efficiency in calibration.chips.items():
        in_fp8 = {"fp8"} if BOARDS[name].chip.fp8_tflops else set()
        assert set(efficiency.sources) == {"matmul", "attention", "memory", "fused", "start_us"} | in_fp8
        assert (efficiency.fp8 is not None) == bool(in_fp8)
    with pytest.raises(ConfigError, match="TPU.*no row"):
        calibration.of("TPU")


def test_work_takes_what_bounds_it() -> None:
    peak, bandwidth = 1e12, 1e10
    seconds = seconds_of(peak, bandwidth, Efficiency(matmul=0.5, attention=0.25, memory=0.8, fused=0.5, start_us=10))
    assert seconds(cost(flops=1e12)) == pytest.approx(2)
    assert seconds(cost(kind="attention", flops=1e12)) == pytest.approx(4)
    assert seconds(cost(flops=1e9, bytes=8e9)) == pytest.approx(1)
    assert seconds(cost(kind="memory", bytes=8e9)) == pytest.approx(0.5)
    assert seconds(cost(flops=1, bytes=1, count=1000)) == pytest.approx(0.01)
    assert seconds(cost(kind="comm", bytes=1e9, group="tp", op="all_reduce")) == 0


def fp8_run(**changes: Any) -> RunConfig:
    run = recipe("aquila-vl-2b/2a")
    return run.replace(precision=run.precision.replace(fp8_format="hybrid"), **changes)


def test_products_of_layers_take_the_peak_of_fp8_in_runs_that_ask_for_it() -> None:
    cluster = parse_cluster("1x8xH100")
    efficiency = Calibration.load(CALIBRATION).of("H100")
    usual, fast = (rate_of(run, cluster, efficiency) for run in (recipe("aquila-vl-2b/2a"), fp8_run()))
    chip = cluster.chip
    assert efficiency.fp8 is not None and chip.fp8_tflops is not None
    gained = (chip.fp8_tflops * efficiency.fp8) / (chip.bf16_tflops * efficiency.matmul)
    for part, kind, times in [
        ("decoder", "matmul", gained),
        ("cross_attention", "matmul", gained),
        *((part, "matmul", 1) for part in ("tower", "connector", "head")),
        ("decoder", "attention", 1),
        ("decoder", "memory", 1),
    ]:
        work = cost(part=part, kind=kind, flops=1e15 if kind != "memory" else 0, bytes=1e9)
        assert usual(work) / fast(work) == pytest.approx(times)
    assert not fp8_assumptions(recipe("aquila-vl-2b/2a"), efficiency)
    said = " ".join(fp8_assumptions(fp8_run(), efficiency))
    assert "60% of the FP8 peak (assumed" in said and "not modelled" in said


def test_fp8_is_refused_as_in_training() -> None:
    calibration = Calibration.load(CALIBRATION)
    for chip, capability, run in (
        ("A100-80GB", (8, 0), fp8_run()),
        ("H100", (9, 0), fp8_run(transformer_impl="local")),
    ):
        with pytest.raises(UnavailableError) as training:
            check_fp8(run.precision, chip, capability, has_engine=run.transformer_impl != "local")
        with pytest.raises(UnavailableError) as planned:
            rate_of(run, parse_cluster(f"1x8x{chip}"), calibration.of(chip))
        assert str(planned.value) == str(training.value) and planned.value.exit_code == 2


def test_what_delayed_scales_forbid_is_refused_as_in_training() -> None:
    recompute = RecomputeConfig(granularity="selective", modules=("layernorm",))
    run = fp8_run(recompute=recompute)
    with pytest.raises(UnavailableError) as training:
        check_recompute(recompute, run.precision, on_gpu=True, has_engine=True)
    with pytest.raises(UnavailableError) as planned:
        rate_of(run, parse_cluster("1x8xH100"), Calibration.load(CALIBRATION).of("H100"))
    assert str(planned.value) == str(training.value)


@pytest.mark.parametrize("lacking", ["capability", "fp8_tflops"])
def test_a_chip_that_does_not_say_its_fp8_is_refused(lacking: str) -> None:
    cluster = parse_cluster("1x8xH100")
    efficiency = Calibration.load(CALIBRATION).of("H100")
    with pytest.raises(ConfigError, match=f"Chip.{lacking}.*not given.*; write"):
        rate_of(fp8_run(), cluster.replace(chip=cluster.chip.replace(**{lacking: None})), efficiency)
    with pytest.raises(ConfigError, match="Efficiency.fp8"):
        rate_of(fp8_run(), cluster, efficiency.replace(fp8=None))


@pytest.mark.parametrize(("chunks", "stages"), [(1, 1), (1, 4), (2, 4), (3, 2)])
def test_stages_hold_the_microbatches_that_wait_for_their_backward(chunks: int, stages: int) -> None:
    """One forward-backward: stages - stage; interleaved: the warm-up of megatron-core and one more."""
    microbatches = 4 * stages
    for stage in range(stages):
        behind = stages - stage - 1
        expected = behind + 1 if chunks == 1 else 2 * behind + (chunks - 1) * stages + 1
        assert in_flight(Shape(stages, chunks, microbatches), stage) == expected
        one = ChunkMemory(held=10, forward_peak=13, backward_peak=17)
        assert peak_bytes([one] * chunks, stage, stages, microbatches) == 10 * (expected - 1) + 17


def test_chunks_of_different_size_are_held_as_often_as_each_waits() -> None:
    """The second of two stages: a forward pass of each chunk for the first two microbatches, then in turn."""
    draw = random.Random(0)
    first, second = (ChunkMemory(size, size, size) for size in (draw.randrange(1, 1000), draw.randrange(1, 1000)))
    assert peak_bytes([first, second], 1, 2, 2) == 2 * first.held + second.held
