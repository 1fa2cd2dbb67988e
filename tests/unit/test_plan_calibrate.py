"""This CPU as a cluster: rates out of timed operations, the file they are written to, and plans that follow them."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import pytest

from megavlm import cli
from megavlm.build.run_config import ParallelConfig, RunConfig
from megavlm.parallel import groups as parallel_groups
from megavlm.plan import calibrate as calibrating
from megavlm.plan.calibrate import TimedDecoder, cluster_of, disturbed
from megavlm.plan.cluster import Cluster, parse_cluster
from megavlm.plan.cost import Efficiency, seconds_of
from megavlm.plan.fit import MachineTimes, TimedWork, Timing, fitted
from megavlm.plan.judge import judge
from megavlm.plan.mix import mix_of
from megavlm.plan.profile import Kind, OpCost
from megavlm.plan.stage import profile_run
from megavlm.recipes import recipe
from megavlm.testing import spawn

MACHINE = MachineTimes(matmul=9e10, attention=3e10, memory=2e10, operands=6e9, allocated=5e9, start=2.5e-5)
GIVEN_BACK = 0.4
"""Of what new tensors cost, behind operations and not in them."""
BETWEEN = 1.8e-5
"""Of a start, what lies between operations and not in them."""


def seconds(work: TimedWork, machine: MachineTimes = MACHINE) -> float:
    """Of an operation on that machine, without what lies before and behind it."""
    inside = machine.start - BETWEEN + (1 - GIVEN_BACK) * work.made / machine.allocated
    if work.kind == "matmul":
        return inside + work.flops / machine.matmul + work.bytes / machine.operands
    if work.kind == "attention":
        return inside + work.flops / machine.attention + work.bytes / machine.memory
    return inside + work.bytes / machine.memory


def step(draw: random.Random, largest: float, noise: float = 0.0) -> Timing:
    """Operations up to so many bytes, each as often as in a decoder."""
    kinds: dict[Kind, int] = {"matmul": 75, "attention": 12, "memory": 400}
    works = []
    for kind in (kind for kind, count in kinds.items() for _ in range(count)):
        size = draw.uniform(0.01, 1) * largest
        flops = 0.0 if kind == "memory" else size * draw.uniform(5, 60)
        made = size * draw.choice([0, 0, 0.2, 0.5])
        work = TimedWork(kind, flops, size, made, 0.0)
        works.append(work._replace(seconds=seconds(work) * draw.uniform(1 - noise, 1 + noise)))
    behind = sum(BETWEEN + GIVEN_BACK * work.made / MACHINE.allocated for work in works)
    return Timing(sum(map(seconds, works)) + behind, works)


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-3), (0.3, 0.15)])
def test_rates_are_found_in_the_times_of_operations(noise: float, tolerance: float) -> None:
    draw = random.Random(2)
    large = [step(draw, size, noise) for size in (3e5, 2e6, 2e7)]
    assert fitted(large, step(draw, 2e3, noise)) == pytest.approx(MACHINE, rel=tolerance)


def test_what_is_found_adds_up_to_the_longest_whole_step() -> None:
    draw = random.Random(4)
    large, small = [step(draw, size, 0.3) for size in (3e5, 2e7)], step(draw, 2e3)
    whole = large[1]._replace(seconds=1.3 * large[1].seconds)
    found = fitted([large[0], whole], small)
    total = 0.0
    for work in whole.works:
        bandwidth = found.operands if work.kind == "matmul" else found.memory
        rate = found.matmul if work.kind == "matmul" else found.attention
        total += found.start + work.flops / rate + work.bytes / bandwidth + work.made / found.allocated
    assert total == pytest.approx(whole.seconds)
    assert found.allocated < fitted(large, small).allocated  # what is not in the operations is thought to be theirs


def test_a_measured_machine_is_read_back_and_takes_what_was_measured(tmp_path: Path) -> None:
    written = cluster_of(MACHINE, float32=1e11, bfloat16=2e11, copied=1.5e10)
    (tmp_path / "own.yaml").write_text(written.to_yaml())
    cluster = parse_cluster(str(tmp_path / "own.yaml"))
    assert cluster == written and cluster.gpus == 1
    assert cluster.efficiency is not None
    assert set(cluster.efficiency.sources) == {"matmul", "attention", "memory", "operands", "allocated", "start_us"}
    chip = cluster.chip
    assert chip.flops_per_second(in_float32=True) == 1e11 and chip.flops_per_second(in_float32=False) == 2e11
    takes = seconds_of(chip.flops_per_second(True), chip.bytes_per_second, cluster.efficiency)
    draw = random.Random(6)
    for work in step(draw, 1e7).works:
        cost = OpCost(
            part="decoder", kind=work.kind, phase="forward", flops=work.flops, bytes=work.bytes, made=work.made
        )
        behind = BETWEEN + GIVEN_BACK * work.made / MACHINE.allocated
        assert takes(cost) == pytest.approx(work.seconds + behind)


QUIET = [0.100, 0.105, 0.098]


@pytest.mark.parametrize(
    ("wholes", "found"),
    [
        ([QUIET, [0.5, 0.52, 0.51]], None),
        ([QUIET, [0.5, 0.7, 0.8]], (0.5, 0.8)),
        ([[0.1, 0.9, 0.2], [0.5, 0.9, 0.6]], (0.1, 0.9)),
        ([[0.9, 0.3, *QUIET]], None),  # of more rounds the fastest count
        ([[0.9, 0.3, 0.1, 0.105]], (0.1, 0.3)),
    ],
)
def test_other_work_on_the_machine_shows_in_steps_that_should_be_alike(
    wholes: list[list[float]], found: tuple[float, float] | None
) -> None:
    assert disturbed(wholes) == found


class Slowed:
    """A decoder whose steps take what it is told, and the last of that from then on."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds, self.wholes = seconds, dict[int, list[float]]()
        self.rounds = 0

    def forget(self) -> None:
        self.wholes.clear()

    def round(self, tokens: int) -> None:
        times = self.wholes.setdefault(tokens, [])
        times.append(self.seconds[min(len(times), len(self.seconds) - 1)])
        self.rounds = len(times)

    def timing(self, tokens: int, most: int) -> Timing:
        return step(random.Random(tokens), 1e4 * tokens)


@pytest.mark.parametrize(
    ("seconds", "rounds", "is_said"),
    [
        (QUIET, 3, False),
        ([0.9, 0.1, 0.3, 0.1, 0.11], 5, False),
        ([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6], 9, True),
    ],
)
def test_a_busy_machine_is_measured_for_longer_and_then_named(
    seconds: list[float], rounds: int, is_said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Slowed(seconds)

    own = object.__new__(calibrating.Meter)
    own.quick, own.timed, own.small = False, cast(Any, decoder), cast(Any, Slowed(QUIET))
    monkeypatch.setattr(calibrating, "Meter", lambda groups: own)
    monkeypatch.setattr(calibrating, "_product_rate", lambda *_: 1e11)
    monkeypatch.setattr(calibrating, "_copy_rate", lambda *_: 1e10)
    monkeypatch.setattr(calibrating.process_groups, "join", lambda: None)
    monkeypatch.setattr(calibrating.process_groups, "start", lambda *_: None)
    monkeypatch.setattr(calibrating.process_groups, "leave", lambda: None)
    place = tmp_path / "cpu.yaml"
    said = calibrating.calibrate(str(place))
    assert decoder.rounds == rounds and parse_cluster(str(place)).gpus == 1
    assert ("something else computes on this machine" in said) == is_said
    assert not is_said or "took between 100 and 400 ms" in said.splitlines()[-1]


def test_of_more_rounds_than_count_the_slow_ones_are_left_out() -> None:
    decoder = object.__new__(TimedDecoder)
    works = list(step(random.Random(7), 1e5).works)
    slow = [work._replace(seconds=9 * work.seconds) for work in works]
    decoder.wholes = {32: [0.9, 0.1, 0.12, 0.8, 0.11, 0.1]}
    decoder.followed = {32: [slow, works, works, slow, works, works]}
    found = decoder.timing(32, 4)
    assert found.seconds == pytest.approx(0.105) and found.works == works


def predicted(slower: float) -> list[float]:
    """Seconds of a step of a tiny recipe: as it is, with twice the rows, in rows of half the length."""
    *usual, start = MACHINE
    matmul, attention, memory, operands, allocated = (rate / slower for rate in usual)
    times = MachineTimes(matmul, attention, memory, operands, allocated, start * slower)
    cluster = cluster_of(times, float32=1e9, bfloat16=1e9, copied=1e9)
    assert cluster.efficiency is not None
    run = recipe("decoder-tiny")
    found = []
    for changes in ({}, {"global_batch_size": 32}, {"seq_length": 32}):
        changed = run.replace(train=run.train.replace(**changes))
        found.append(judge(changed, cluster, mix_of(changed, False), cluster.efficiency).seconds)
    return found


def test_a_plan_on_a_cpu_follows_its_speed_and_its_work() -> None:
    (usual,) = spawn(predicted, 1, 1.0)
    (slow,) = spawn(predicted, 1, 3.0)
    assert slow == pytest.approx([3 * one for one in usual])
    plain, twice, shorter = usual
    assert 1.7 * plain < twice < 2 * plain  # the optimizer's step is the same
    assert 0.5 * plain < shorter < plain  # operations are as many as before


def counted_and_done() -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """(operations, flops, bytes, bytes allocated) of a step by kind, as a plan counts them and as they are done."""
    run: RunConfig = recipe("decoder-tiny")
    mix = mix_of(run, False)
    (profile,) = profile_run(run, 1, round(mix.rows), {"mean": mix.mean, "worst": mix.worst})
    counted: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    done: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for cost in profile.mean.costs:
        times = 1 if cost.phase == "step" else mix.rows
        _add(counted[cost.kind], times * cost.count, times * cost.flops, times * cost.bytes, times * cost.made)
    parallel_groups.join()
    decoder = TimedDecoder(run, parallel_groups.start(ParallelConfig()))
    for _ in range(2):
        decoder.round(run.row_tokens)
    for work in decoder.followed[run.row_tokens][-1]:
        _add(done[work.kind], 1, work.flops, work.bytes, work.made)
    parallel_groups.leave()
    return dict(counted), dict(done)


def _add(total: list[float], *values: float) -> None:
    total[:] = [one + other for one, other in zip(total, values, strict=True)]


def test_a_plan_counts_what_a_real_step_does() -> None:
    ((counted, done),) = spawn(counted_and_done, 1)
    assert counted["matmul"] == done["matmul"] and counted["attention"] == done["attention"]
    assert counted["memory"] == pytest.approx(done["memory"], rel=0.02)


def test_costs_add_up_where_nothing_hides() -> None:
    takes = seconds_of(
        1e12, 1e10, Efficiency(matmul=0.5, attention=0.5, memory=0.8, operands=0.4, start_us=10, hides=False)
    )
    product = OpCost(part="decoder", kind="matmul", phase="forward", flops=1e12, bytes=4e9, count=1000)
    assert takes(product) == pytest.approx(2 + 1 + 0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--calibrate", "absent/cpu.yaml"], "--calibrate"),
        (["--calibrate", "cpu.txt"], "name a .yaml file"),
        (["--calibrate"], "--calibrate"),
        (["decoder-tiny", "--calibrate", "cpu.yaml"], "measure first"),
        (["decoder-tiny", "--cluster", "1xH100", "--calibration", "absent.yaml"], "cannot be read"),
        (["decoder-tiny", "--cluster", "1xH100", "--calibration", "broken.yaml"], "broken.yaml"),
        (["decoder-tiny", "--cluster", "1xH100", "--calibration", "other.yaml"], "has no row for this chip"),
        (["decoder-tiny", "--cluster", "1xH100", "--calibration", "fast.yaml"], "outside (0, 1]"),
        (["decoder-tiny", "--cluster", "cluster.yaml"], "outside (0, 1]"),
    ],
)
def test_an_unreadable_calibration_is_refused_in_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    row = "{matmul: 0.5, attention: 0.5, memory: 0.5}"
    Path("broken.yaml").write_text("chips: {H100: [")
    Path("other.yaml").write_text(f"chips: {{B300: {row}}}")
    Path("fast.yaml").write_text("chips: {H100: {matmul: 1.5, attention: 0.5, memory: 0.5}}")
    measured = cluster_of(MACHINE, 1e11, 1e11, 1e10)
    Path("cluster.yaml").write_text(measured.to_yaml().replace("  operands: ", "  operands: -"))
    assert cli.main(["plan", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


def test_a_file_without_measurements_leaves_its_chip_to_the_calibration_file() -> None:
    assert Cluster.from_yaml(parse_cluster("1xH100").to_yaml()).efficiency is None
