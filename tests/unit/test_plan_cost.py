"""The time of work on a chip, and the file that says what kernels reach of it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from megavlm.errors import ConfigError
from megavlm.plan.cluster import BOARDS
from megavlm.plan.cost import CALIBRATION, Calibration, Efficiency, seconds_of
from megavlm.plan.in_flight import ChunkMemory, peak_bytes
from megavlm.plan.pipeline_program import Shape, in_flight
from megavlm.plan.profile import OpCost


def cost(**fields: Any) -> OpCost:
    return OpCost(**{"part": "decoder", "kind": "matmul", "phase": "forward", **fields})


def test_every_known_chip_is_calibrated_and_every_number_has_its_source() -> None:
    calibration = Calibration.load(CALIBRATION)
    assert set(calibration.chips) == set(BOARDS)
    for efficiency in calibration.chips.values():
        assert set(efficiency.sources) == {"matmul", "attention", "memory", "fused", "start_us"}
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
