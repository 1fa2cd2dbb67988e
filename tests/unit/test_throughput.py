"""How fast a run says it is."""

from __future__ import annotations

import math
from datetime import datetime

import pytest
from reports import groups_of_one, logging_run, report_of, work_of

from megavlm.build.costs import causal_work, part_costs
from megavlm.log import IterationStats, iteration_line
from megavlm.platform.device import bf16_peak_tflops
from megavlm.train.callbacks.console import speeds
from megavlm.train.callbacks.window import Window, mean_losses
from megavlm.train.throughput import Speedometer, Throughput


def test_figures_are_those_of_all_steps_together() -> None:
    run = logging_run(peak_tflops=0.001)
    first = report_of(1, seconds=0.5, waited=0.0, work=work_of(tokens=1000, images=3, squared_lengths=70_000))
    second = report_of(2, seconds=1.5, waited=0.5, work=work_of(tokens=2000, images=5, squared_lengths=10_000))
    found = Speedometer(run, groups_of_one(world_size=4)).over([first, second])
    flops = sum(part_costs(run, causal_work(*of_step, 0, 0)).total for of_step in ((1000, 70_000), (2000, 10_000)))
    assert found.seconds_per_step == 1.0
    assert (found.tokens_per_second, found.images_per_second, found.waited) == (1500.0, 4.0, 0.25)
    assert found.tflops_per_gpu == pytest.approx(flops / 2 / 4 / 1e12, rel=1e-12)
    assert found.mfu == pytest.approx(found.tflops_per_gpu / 0.001)


def test_a_decoder_of_dense_rows_costs_six_times_its_weights_and_half_of_the_square() -> None:
    run = logging_run()
    decoder = run.decoder
    layer = decoder.hidden_size * (4 * decoder.hidden_size + 3 * decoder.ffn_hidden_size)
    weights = decoder.num_layers * layer + decoder.hidden_size * decoder.vocab_size
    pairs = 16 * 64 * 65 / 2
    attention = 3 * 4 * pairs * decoder.hidden_size * decoder.num_layers
    assert part_costs(run, causal_work(1024, 16 * 64**2, 0, 0)).total == 6 * 1024 * weights + attention


def test_no_mfu_of_a_chip_that_nobody_knows() -> None:
    found = Speedometer(logging_run(), groups_of_one()).over([report_of(1)])  # a CPU, and no --peak-tflops
    assert found.mfu is None
    assert "MFU (%)" not in speeds(found)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A100-SXM-64GB", None),
        ("this CPU", None),
    ],
)
def test_peaks_go_by_the_whole_name(name: str, peak: float | None) -> None:
    assert bf16_peak_tflops(name) == peak


def test_the_console_line_has_megatrons_words_where_megatron_has_them() -> None:
    throughput = Throughput(
        seconds_per_step=0.5,
        tokens_per_second=2048.0,
        images_per_second=0.0,
        tflops_per_gpu=0.00571,
        mfu=0.571,
        waited=0.004,
    )
    stats = IterationStats(
        iteration=1,
        train_iters=2,
        consumed_samples=16,
        elapsed_time_per_iteration_ms=500.0,
        learning_rate=1e-3,
        global_batch_size=16,
        losses={"lm loss": 1.0},
        grad_norm=1.0,
        throughput=speeds(throughput),
    )
    line = iteration_line(stats, datetime(2026, 11, 20))
    assert (
        "elapsed time per iteration (ms): 500.0 | throughput per GPU (TFLOP/s/GPU): 0.0057 | MFU (%): 57.1 | "
        "tokens/s: 2048.0 | images/s: 0.0 | waited for data (%): 0.4000 | learning rate:" in line
    )


def test_a_window_gives_means_and_counts_since_the_last_entry() -> None:
    window = Window(logging_run(log_interval=3), groups_of_one())
    losses = [{"lm loss": 4.0, "lm loss/a": 1.0}, {"lm loss": math.nan}, {"lm loss": 2.0, "lm loss/b": 7.0}]
    counts = [(0, 0), (1, 1), (1, 1)]
    for start in (0, 3):
        found = [
            window.add(report_of(start + n, losses=of_step, skipped=start // 3 + skipped, nan=start // 3 + nan))
            for n, (of_step, (skipped, nan)) in enumerate(zip(losses, counts, strict=True), 1)
        ]
        assert found[:2] == [None, None]
        assert found[2] is not None
        assert found[2].losses == {"lm loss": 3.0, "lm loss/a": 1.0, "lm loss/b": 7.0}
        assert (found[2].skipped, found[2].nan) == (1, 1)


def test_losses_that_are_never_finite_stay_so() -> None:
    assert math.isnan(mean_losses([{"lm loss": math.nan}])["lm loss"])
